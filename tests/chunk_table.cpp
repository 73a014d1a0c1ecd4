// What csrc/cuda/chunk_table.h makes of lists of tensors, for test_cuda_chunk_table.py.
#include "cuda/chunk_table.h"

#include <memory>
#include <type_traits>

using namespace fastmeta;

namespace {

constexpr int K = 3;
ChunkList<K> list;
std::vector<std::unique_ptr<LargeTable<K>>> tables;

template <size_t bytes>
void keep(const ChunkTable<K, bytes>& table) {
  auto kept = std::make_unique<LargeTable<K>>();
  std::copy_n(table.entries, table.size, kept->entries);
  std::copy_n(table.words, ChunkTable<K, bytes>::max_words, kept->words);
  kept->chunks_before = table.chunks_before;
  kept->chunks = table.chunks;
  kept->size = table.size;
  tables.push_back(std::move(kept));
}

}  // namespace

extern "C" {

void clear() {
  list = {};
  tables.clear();
}

// `strides` [3, dimensions]; the third list is without gaps where `dense`.
int add(const int64_t* addresses, const int64_t* sizes, const int64_t* strides, int64_t dimensions, bool dense) try {
  char* data[K];
  for (int k = 0; k < K; ++k) data[k] = reinterpret_cast<char*>(addresses[k]);
  list.add(data, sizes, {strides, strides + dimensions, dense ? nullptr : strides + 2 * dimensions}, dimensions, 7);
  return 0;
} catch (const std::length_error&) {
  return 1;
}

// Number of launches, -1 unless the last and no other is said to be; how many of them have the small table.
int make(int64_t* small) {
  *small = 0;
  int last_ones = 0;
  list.for_each_table([&](const auto& table, bool last) {
    *small += std::is_same_v<decltype(table), const SmallTable<K>&>;
    keep(table);
    last_ones = last ? last_ones + 1 : 0;
  });
  return tables.empty() || last_ones == 1 ? static_cast<int>(tables.size()) : -1;
}

void limits(int64_t* limits) {
  const int64_t all[] = {SmallTable<K>::max_entries, SmallTable<K>::max_words, sizeof(SmallTable<K>),
                         LargeTable<K>::max_entries, LargeTable<K>::max_words, sizeof(LargeTable<K>)};
  std::copy_n(all, 6, limits);
}

// size, chunks, chunks before.
void table(int number, int64_t* out) {
  out[0] = tables[number]->size;
  out[1] = tables[number]->chunks;
  out[2] = tables[number]->chunks_before;
}

// The address of the first list's tensor, first element, count, dimensions (-1: flat), whether aligned, kind.
void chunk(int number, uint32_t index, int64_t* out) {
  const LargeTable<K>& t = *tables[number];
  const Chunk<K> found = chunk_of(t, index);
  out[0] = reinterpret_cast<int64_t>(found.entry.data[0]);
  out[1] = found.first;
  out[2] = found.count;
  out[3] = found.entry.layout < 0 ? -1 : t.words[found.entry.layout];
  out[4] = found.entry.aligned;
  out[5] = found.entry.kind;
}

// Offsets of an element of a chunk's entry in the three lists.
void offsets(int number, uint32_t index, int64_t element, int64_t* out) {
  const LargeTable<K>& t = *tables[number];
  const Chunk<K> found = chunk_of(t, index);
  int64_t places[K] = {element, element, element};
  if (found.entry.layout >= 0) locate(t.words + found.entry.layout, element, places);
  std::copy_n(places, K, out);
}
}
