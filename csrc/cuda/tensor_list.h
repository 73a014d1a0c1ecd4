// A block's work on its chunk of a list of tensors (chunk_table.h): 16 bytes at a time where the chunk is flat and
// aligned, else an element at a time. And from torch's tensors to the entries of the table.
#pragma once

#include "cuda/chunk_table.h"
#include "cuda/convert.h"
#include "list_tensor.h"

namespace fastmeta {

constexpr int list_threads = 256;

// V elements that lie beside each other.
template <class T, int V>
struct alignas(sizeof(T) * V < vector_bytes ? sizeof(T) * V : vector_bytes) Pack {
  T value[V];
};

template <int V, class T>
__device__ __forceinline__ Pack<T, V> load(const T* from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}
template <class T, int V>
__device__ __forceinline__ void store(T* to, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

// An operation on elements of K lists is a class with
//   static constexpr int size(int k)            bytes of an element of the k-th list
//   static constexpr int ahead                  loads of a thread that are under way before the first is used
//   template <int V> Loaded load(at) const      reads V elements at the K addresses `at`
//   void store(loaded, at)                      computes and writes
template <int V, bool flat, int K, class Operation>
__device__ __forceinline__ void walk(Operation& operation, const Chunk<K>& chunk, const int64_t* layout, int begin,
                                     int end) {
  constexpr int ahead = flat ? Operation::ahead : 1;
  const auto addresses = [&](int i, char*(&at)[K]) {
    const int64_t element = chunk.first + begin + static_cast<int64_t>(i) * V;
    int64_t offsets[K];
    if constexpr (flat) {
      for (int k = 0; k < K; ++k) offsets[k] = element;
    } else {
      locate(layout, element, offsets);
    }
    for (int k = 0; k < K; ++k) at[k] = chunk.entry.data[k] + offsets[k] * Operation::size(k);
  };
  const int count = (end - begin) / V;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < count; i += ahead * list_threads) {
    char* at[ahead][K];
    decltype(operation.template load<V>(at[0])) loaded[ahead];
    for (int j = 0; j < ahead; ++j) {
      const int next = i + j * list_threads;
      addresses(next < count ? next : i, at[j]);
      loaded[j] = operation.template load<V>(at[j]);
    }
    for (int j = 0; j < ahead; ++j) {
      if (i + j * list_threads < count) operation.store(loaded[j], at[j]);
    }
  }
}

template <int K, class Operation>
__device__ __forceinline__ void run_chunk(Operation& operation, const Chunk<K>& chunk, const int64_t* words) {
  constexpr int V = static_cast<int>(vector_bytes) / Operation::size(0);
  if (chunk.entry.layout >= 0) {
    walk<1, false>(operation, chunk, words + chunk.entry.layout, 0, chunk.count);
    return;
  }
  const int in_vectors = chunk.entry.aligned ? chunk.count / V * V : 0;
  walk<V, true>(operation, chunk, nullptr, 0, in_vectors);
  walk<1, true>(operation, chunk, nullptr, in_vectors, chunk.count);
}

enum class Kind : uint8_t { float32, bfloat16, float16, float64 };

inline int kind_of(const ListTensor& tensor) {
  switch (tensor.type) {
    case torch::headeronly::ScalarType::Float:
      return static_cast<int>(Kind::float32);
    case torch::headeronly::ScalarType::BFloat16:
      return static_cast<int>(Kind::bfloat16);
    case torch::headeronly::ScalarType::Half:
      return static_cast<int>(Kind::float16);
    default:
      return static_cast<int>(Kind::float64);
  }
}

// Adds the tensors of one place in K lists. nullptr: a copy at `copy`, without gaps, in the order of the first.
template <int K>
void add_tensors(ChunkList<K>& list, const ListTensor* const (&tensors)[K], int kind, char* copy = nullptr) {
  const ListTensor& first = *tensors[0];
  char* data[K];
  const int64_t* strides[K];
  bool contiguous = true;
  for (int k = 0; k < K; ++k) {
    data[k] = tensors[k] ? tensors[k]->data : copy;
    strides[k] = tensors[k] ? tensors[k]->strides : nullptr;
    contiguous = contiguous && (!tensors[k] || tensors[k]->contiguous);
  }
  if (contiguous) return list.add_flat(data, first.numel, kind);
  list.add(data, first.sizes, strides, first.dim, kind);
}

}  // namespace fastmeta
