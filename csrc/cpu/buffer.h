// Scratch memory, aligned for the widest vectors and not initialised.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace fastmeta {

template <class A>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<A*>(::operator new(static_cast<size_t>(size) * sizeof(A), alignment))) {}
  A* data() const { return data_.get(); }

 private:
  static constexpr std::align_val_t alignment{64};
  struct Free {
    void operator()(A* data) const { ::operator delete(data, alignment); }
  };
  std::unique_ptr<A, Free> data_;
};

}  // namespace fastmeta
