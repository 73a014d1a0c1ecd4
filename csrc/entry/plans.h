// The plans of one operator by layout: a hash table whose keys are a few dozen integers.
#pragma once

#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

namespace fastmeta {

using KeyView = std::span<const uint64_t>;

class Plans {
 public:
  Plans() = default;
  Plans(const Plans&) = delete;
  Plans& operator=(const Plans&) = delete;
  ~Plans() { forget(); }

  // Borrowed, or null.
  PyObject* find(KeyView key) const {
    const auto place = table_.find(key);
    return place == table_.end() ? nullptr : place->second;
  }

  void keep(KeyView key, PyObject* plan) {
    if (table_.size() >= most) forget();
    PyObject*& place = table_[{key.begin(), key.end()}];
    PyObject* before = place;
    place = Py_NewRef(plan);
    Py_XDECREF(before);
  }

  // The table is emptied first: a plan's destructor may run Python.
  void forget() {
    Table old;
    old.swap(table_);
    for (auto& [key, plan] : old) Py_DECREF(plan);
  }

  size_t size() const { return table_.size(); }

 private:
  static constexpr size_t most = 4096;  // a loop whose batch size varies must not grow the table without end

  struct Hash {
    using is_transparent = void;
    size_t operator()(KeyView key) const {
      uint64_t hash = key.size();
      for (const uint64_t word : key) {
        hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
        hash ^= hash >> 32;
      }
      return hash;
    }
  };
  struct Equal {
    using is_transparent = void;
    bool operator()(KeyView a, KeyView b) const { return std::equal(a.begin(), a.end(), b.begin(), b.end()); }
  };
  using Table = std::unordered_map<std::vector<uint64_t>, PyObject*, Hash, Equal>;
  Table table_;
};

}  // namespace fastmeta
