// Lists of tensors as a kernel sees them: a table among its parameters says which chunk of which tensor a block works
// on, so that one launch serves tensors of any sizes, dtypes and layouts. No CUDA and no torch: tests drive it alone.
//
// The i-th tensors of K lists are one entry. Its elements are numbered in the order in which the first of the K lies in
// memory; dimensions that follow each other in all K are merged, and an entry is flat if that leaves one run in each.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <stdexcept>
#include <vector>

#ifdef __CUDACC__
#define FASTMETA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTMETA_HOST_DEVICE inline
#endif

namespace fastmeta {

constexpr int64_t chunk_elements = 4096;     // of one block
constexpr int64_t most_chunks = 0x7fffffff;  // blocks of a launch
constexpr int most_dimensions = 64;          // larger than 1: more have no address
constexpr uintptr_t vector_bytes = 16;

template <int K>
struct Entry {
  char* data[K];
  int64_t count;         // elements, at least 1
  uint32_t first_chunk;  // of the launch
  int16_t layout;        // place of its layout among the table's words; -1: flat
  uint8_t kind;          // of the element types, as the operator numbers them
  bool aligned;          // flat, and every run begins at a multiple of vector_bytes
};

// A layout is the words: number of dimensions, their sizes, their strides in elements in each of the K.
constexpr int words_of(int lists, int dimensions) { return 1 + (1 + lists) * dimensions; }

// Of at most `bytes` bytes.
template <int K, size_t bytes>
struct ChunkTable {
  static constexpr int lists = K;
  static constexpr int max_words = std::max<int>(bytes / 32, words_of(K, most_dimensions));
  static constexpr int max_entries = static_cast<int>((bytes - 8 * max_words - 16) / sizeof(Entry<K>));

  Entry<K> entries[max_entries];
  int64_t words[max_words];
  int64_t chunks_before;  // in the launches before this one
  uint32_t chunks;
  int32_t size;
};

// All parameters of a launch travel to the device, so short lists have a table of their own.
template <int K>
using SmallTable = ChunkTable<K, 8 * 1024>;
template <int K>
using LargeTable = ChunkTable<K, 32 * 1024 - 256>;

// What the block with this chunk works on: elements [first, first + count) of the entry.
template <int K>
struct Chunk {
  const Entry<K>& entry;
  int64_t first;
  int count;
};

template <int K, size_t bytes>
FASTMETA_HOST_DEVICE Chunk<K> chunk_of(const ChunkTable<K, bytes>& table, uint32_t chunk) {
  int low = 0, high = table.size;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.entries[middle].first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const Entry<K>& entry = table.entries[low];
  const int64_t first = static_cast<int64_t>(chunk - entry.first_chunk) * chunk_elements;
  const int64_t rest = entry.count - first;
  return {entry, first, static_cast<int>(rest < chunk_elements ? rest : chunk_elements)};
}

// a / b of numbers below 2^53. A GPU divides 64-bit integers by a long subroutine. The quotient of doubles is rounded,
// but not up to an integer: the next one is 1/b of itself away or more.
FASTMETA_HOST_DEVICE int64_t quotient(int64_t a, int64_t b) {
  if (static_cast<uint64_t>(a | b) >> 32) return static_cast<int64_t>(static_cast<double>(a) / static_cast<double>(b));
  return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}

// Where an element lies in each of the K, in elements from their beginnings.
template <int K>
FASTMETA_HOST_DEVICE void locate(const int64_t* layout, int64_t element, int64_t (&offsets)[K]) {
  const int dimensions = static_cast<int>(layout[0]);
  const int64_t *sizes = layout + 1, *strides = sizes + dimensions;
  for (int k = 0; k < K; ++k) offsets[k] = 0;
#pragma unroll 1
  for (int d = dimensions - 1; d > 0; --d) {
    const int64_t next = quotient(element, sizes[d]), place = element - next * sizes[d];
    for (int k = 0; k < K; ++k) offsets[k] += place * strides[k * dimensions + d];
    element = next;
  }
  for (int k = 0; k < K; ++k) offsets[k] += element * strides[k * dimensions];
}

// The entries of all launches.
template <int K>
class ChunkList {
 public:
  void reserve(size_t tensors) {
    entries_.reserve(tensors);
    layouts_.reserve(tensors);
  }

  // Tensors without gaps, in one order.
  void add_flat(char* const (&data)[K], int64_t count, int kind) {
    if (count > 0) add_entry(data, count, kind, true, static_cast<int64_t>(words_.size()));
  }

  // Tensors of one shape. Strides are in elements; nullptr: without gaps, in the order of the first of the K.
  void add(char* const (&data)[K], const int64_t* sizes, const int64_t* const (&strides)[K], int64_t dimensions,
           int kind);

  // Entries with one of these addresses, in ascending order, in the first list are not worked on any more.
  void leave_out(const char* const* begin, const char* const* end) {
    for (Entry<K>& entry : entries_) {
      if (std::binary_search(begin, end, entry.data[0])) entry.count = 0;  // its one chunk has no elements
    }
  }

  // Calls launch(table, whether it is the last) until every entry has been in one.
  template <class Launch>
  void for_each_table(const Launch& launch) const;

  int64_t chunks() const {
    int64_t sum = 0;
    for (const Entry<K>& entry : entries_) sum += chunks_of(entry);
    return sum;
  }

 private:
  struct Next {
    size_t entry = 0;
    int64_t chunks = 0;
  };

  static int64_t chunks_of(const Entry<K>& entry) { return (entry.count - 1) / chunk_elements + 1; }
  void add_entry(char* const (&data)[K], int64_t count, int kind, bool flat, int64_t begin);
  template <size_t bytes>
  void fill(ChunkTable<K, bytes>& table, Next& next) const;

  std::vector<Entry<K>> entries_;
  std::vector<int64_t> layouts_;  // where the layout of each entry begins among the words
  std::vector<int64_t> words_;
};

template <int K>
void ChunkList<K>::add_entry(char* const (&data)[K], int64_t count, int kind, bool flat, int64_t begin) {
  if (count > most_chunks * chunk_elements) throw std::length_error("a tensor of more than 2^43 elements");
  Entry<K> entry{};
  bool aligned = flat;
  for (int k = 0; k < K; ++k) {
    entry.data[k] = data[k];
    aligned = aligned && reinterpret_cast<uintptr_t>(data[k]) % vector_bytes == 0;
  }
  entry.count = count;
  entry.kind = static_cast<uint8_t>(kind);
  entry.layout = flat ? -1 : 0;
  entry.aligned = aligned;
  entries_.push_back(entry);
  layouts_.push_back(begin);
}

template <int K>
void ChunkList<K>::add(char* const (&data)[K], const int64_t* sizes, const int64_t* const (&strides)[K],
                       int64_t dimensions, int kind) {
  int64_t order[most_dimensions], count = 1;
  int kept = 0;
  for (int64_t d = 0; d < dimensions; ++d) {
    count *= sizes[d];
    if (sizes[d] == 1) continue;
    if (kept == most_dimensions) throw std::length_error("a tensor of more than 64 dimensions larger than 1");
    order[kept++] = d;
  }
  if (count == 0) return;
  std::stable_sort(order, order + kept, [&](int64_t a, int64_t b) { return strides[0][a] > strides[0][b]; });

  // From the innermost dimension out: merged with the one before where that lies right inside it.
  int64_t merged_size[most_dimensions], merged_stride[K][most_dimensions], dense = 1;
  int merged = 0;
  for (int i = kept; i-- > 0;) {
    const int64_t d = order[i];
    int64_t stride[K];
    bool follows = merged > 0;
    for (int k = 0; k < K; ++k) {
      stride[k] = strides[k] ? strides[k][d] : dense;
      follows = follows && stride[k] == merged_stride[k][merged - 1] * merged_size[merged - 1];
    }
    dense *= sizes[d];
    if (follows) {
      merged_size[merged - 1] *= sizes[d];
      continue;
    }
    merged_size[merged] = sizes[d];
    for (int k = 0; k < K; ++k) merged_stride[k][merged] = stride[k];
    ++merged;
  }
  bool flat = merged <= 1;
  for (int k = 0; k < K && merged == 1; ++k) flat = flat && merged_stride[k][0] == 1;
  const auto begin = static_cast<int64_t>(words_.size());
  if (!flat) {
    words_.push_back(merged);
    words_.insert(words_.end(), std::reverse_iterator(merged_size + merged), std::reverse_iterator(merged_size));
    for (int k = 0; k < K; ++k) {
      const int64_t* of_list = merged_stride[k];
      words_.insert(words_.end(), std::reverse_iterator(of_list + merged), std::reverse_iterator(of_list));
    }
  }
  add_entry(data, count, kind, flat, begin);
}

template <int K>
template <size_t bytes>
void ChunkList<K>::fill(ChunkTable<K, bytes>& table, Next& next) const {
  using Table = ChunkTable<K, bytes>;
  table.size = 0;
  table.chunks_before = next.chunks;
  int64_t chunks = 0;
  int words = 0;
  for (; next.entry < entries_.size() && table.size < Table::max_entries; ++next.entry) {
    const Entry<K>& entry = entries_[next.entry];
    const int64_t* layout = words_.data() + layouts_[next.entry];
    const int needed = entry.layout < 0 ? 0 : words_of(K, static_cast<int>(layout[0]));
    if (words + needed > Table::max_words || chunks + chunks_of(entry) > most_chunks) break;
    Entry<K>& placed = table.entries[table.size++] = entry;
    placed.first_chunk = static_cast<uint32_t>(chunks);
    if (needed > 0) placed.layout = static_cast<int16_t>(words);
    std::copy_n(layout, needed, table.words + words);
    words += needed;
    chunks += chunks_of(entry);
  }
  table.chunks = static_cast<uint32_t>(chunks);
  next.chunks += chunks;
}

template <int K>
template <class Launch>
void ChunkList<K>::for_each_table(const Launch& launch) const {
  Next next;
  if (entries_.size() <= SmallTable<K>::max_entries && words_.size() <= SmallTable<K>::max_words &&
      chunks() <= most_chunks) {
    SmallTable<K> table;
    fill(table, next);
    if (table.size > 0) launch(table, true);
    return;
  }
  LargeTable<K> table;
  do {
    fill(table, next);
    launch(table, next.entry == entries_.size());
  } while (next.entry < entries_.size());
}

}  // namespace fastmeta
