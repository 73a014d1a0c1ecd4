// Lists of tensors walked together, in parallel over equal blocks: one pass over memory whatever the sizes.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "list_checks.h"

namespace fastmeta {

constexpr int64_t unit_elements = 16384;  // elements a thread takes at a time
constexpr int64_t block_elements =
    1024;  // elements that a kernel sees at a time: all operands fit the first-level cache

// The i-th tensors of K lists. Flat: all of them lie in memory in one order and without gaps.
template <int K>
struct Group {
  char* data[K];
  int64_t element_size[K];
  int64_t numel;
  bool flat;
  ScalarType type[K];
  std::vector<int64_t> sizes, strides[K];
};

// `tensors` are K in a row.
template <int K>
Group<K> make_group(const ListTensor* tensors) {
  Group<K> group;
  group.numel = tensors[0].numel;
  bool contiguous = true, same = true;
  for (int k = 0; k < K; ++k) {
    const ListTensor& tensor = tensors[k];
    group.data[k] = tensor.data;
    group.element_size[k] = tensor.element_size;
    group.type[k] = tensor.type;
    contiguous = contiguous && tensor.contiguous;
  }
  for (int k = 1; k < K && !contiguous; ++k) {
    for (int64_t d = 0; d < tensors[0].dim; ++d) {
      same = same && (tensors[0].sizes[d] <= 1 || tensors[k].strides[d] == tensors[0].strides[d]);
    }
  }
  // Equal strides that leave no gap: a permuted layout such as channels_last. No two elements share memory (checked).
  group.flat = contiguous || (same && span_of(tensors[0]) == group.numel * group.element_size[0]);
  if (!group.flat) {
    group.sizes.assign(tensors[0].sizes, tensors[0].sizes + tensors[0].dim);
    for (int k = 0; k < K; ++k) group.strides[k].assign(tensors[k].strides, tensors[k].strides + tensors[0].dim);
  }
  return group;
}

// The same group with one operand more, a buffer for a copy of `tensor`: with its strides if it has no gaps, else
// contiguous.
template <int K>
Group<K + 1> with_copy(const Group<K>& group, const ListTensor& tensor, char* data) {
  Group<K + 1> joined;
  joined.numel = group.numel;
  joined.flat = group.flat;
  joined.sizes = group.sizes;
  for (int k = 0; k < K; ++k) {
    joined.data[k] = group.data[k];
    joined.element_size[k] = group.element_size[k];
    joined.type[k] = group.type[k];
    joined.strides[k] = group.strides[k];
  }
  joined.data[K] = data;
  joined.element_size[K] = tensor.element_size;
  joined.type[K] = tensor.type;
  if (!group.flat) {
    auto& strides = joined.strides[K];
    strides.assign(tensor.strides, tensor.strides + tensor.dim);
    if (span_of(tensor) != tensor.numel * tensor.element_size) {
      int64_t stride = 1;
      for (size_t d = strides.size(); d-- > 0; stride *= group.sizes[d]) strides[d] = stride;
    }
  }
  return joined;
}

// Elements [begin, begin + count) of a strided tensor, in the order of its indices, to or from a buffer.
template <bool gather>
void move_strided(char* data, char* buffer, int64_t element_size, const std::vector<int64_t>& sizes,
                  const std::vector<int64_t>& strides, int64_t begin, int64_t count) {
  const int dims = static_cast<int>(sizes.size());
  std::vector<int64_t> place(dims);
  int64_t offset = 0, rest = begin;
  for (int d = dims - 1; d >= 0; --d) {
    place[d] = rest % sizes[d];
    rest /= sizes[d];
    offset += place[d] * strides[d];
  }
  for (int64_t i = 0; i < count; ++i) {
    char* element = data + offset * element_size;
    char* slot = buffer + i * element_size;
    if (gather) {
      std::memcpy(slot, element, element_size);
    } else {
      std::memcpy(element, slot, element_size);
    }
    for (int d = dims - 1; d >= 0; --d) {
      offset += strides[d];
      if (++place[d] < sizes[d]) break;
      offset -= sizes[d] * strides[d];
      place[d] = 0;
    }
  }
}

// Which operands a pass reads and writes, as bits.
struct Access {
  unsigned reads, writes;
};

// The lists laid end to end and cut into units of one size, whatever the tensors' sizes: threads get equal shares.
template <int K>
struct Units {
  const std::vector<Group<K>>& groups;
  std::vector<int64_t> begin;  // of each group, in elements; aligned, so that runs stay aligned
  int64_t count = 0;

  explicit Units(const std::vector<Group<K>>& groups) : groups(groups) {
    int64_t end = 0;
    begin.reserve(groups.size() + 1);
    for (const auto& group : groups) {
      begin.push_back(end);
      end += (group.numel + 63) / 64 * 64;
    }
    begin.push_back(end);
    count = (end + unit_elements - 1) / unit_elements;
  }
};

template <int K, class Block>
void run_block(const Group<K>& group, size_t g, int64_t first, int64_t count, int64_t unit, Access access,
               std::vector<char>& buffers, const Block& block) {
  char* run[K];
  if (group.flat) {
    for (int k = 0; k < K; ++k) run[k] = group.data[k] + first * group.element_size[k];
    return block(g, run, first, count, unit);
  }
  buffers.resize(K * block_elements * sizeof(double));
  for (int k = 0; k < K; ++k) {
    run[k] = buffers.data() + k * block_elements * sizeof(double);
    if (access.reads >> k & 1) {
      move_strided<true>(group.data[k], run[k], group.element_size[k], group.sizes, group.strides[k], first, count);
    }
  }
  block(g, run, first, count, unit);
  for (int k = 0; k < K; ++k) {
    if (access.writes >> k & 1) {
      move_strided<false>(group.data[k], run[k], group.element_size[k], group.sizes, group.strides[k], first, count);
    }
  }
}

// Calls block(group index, pointers to K runs of `count` elements, first element, count, unit) over everything, and
// at_thread_end() once on each thread.
template <int K, class Block>
void for_each_block(const Units<K>& units, Access access, const Block& block, const auto& at_thread_end) {
  torch::stable::parallel_for(0, units.count, 2, [&](int64_t begin_unit, int64_t end_unit) {
    std::vector<char> buffers;
    const auto& begin = units.begin;
    size_t g = std::upper_bound(begin.begin(), begin.end(), begin_unit * unit_elements) - begin.begin() - 1;
    for (int64_t unit = begin_unit; unit < end_unit; ++unit) {
      const int64_t from = unit * unit_elements, to = from + unit_elements;
      for (; g < units.groups.size() && begin[g] < to; ++g) {
        const Group<K>& group = units.groups[g];
        const int64_t last = std::min(to - begin[g], group.numel);
        for (int64_t first = std::max<int64_t>(from - begin[g], 0); first < last; first += block_elements) {
          run_block(group, g, first, std::min(block_elements, last - first), unit, access, buffers, block);
        }
        if (begin[g + 1] > to) break;  // its rest is the next unit's
      }
    }
    at_thread_end();
  });
}

}  // namespace fastmeta
