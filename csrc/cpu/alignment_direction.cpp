// alignment_direction: both running averages and the direction in one pass.
#ifndef FASTMETA_TARGET

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "cpu/stream.h"
#include "cpu/tensor_list.h"
#include "element_types.h"

#define FASTMETA_KERNELS "cpu/alignment_direction.cpp"
#include "cpu/targets.h"

namespace fastmeta {

void align(const ListTensor* tensors, size_t count, const AlignmentNumbers& numbers) {
  std::vector<Group<5>> groups;
  groups.reserve(count);
  int64_t bytes = 0;
  for (size_t i = 0; i < count; ++i) {
    groups.push_back(make_group<5>(tensors + 5 * i));
    bytes += groups[i].numel * (3 * groups[i].element_size[0] + 2 * groups[i].element_size[2]);
  }
  const bool stream = exceeds_cache(bytes);
  for_each_block<5>(
      Units<5>(groups), {0b01111, 0b11100},
      [&](size_t g, char* const(&run)[5], int64_t, int64_t count, int64_t) {
        with_averages(groups[g].type[0], groups[g].type[2] == ScalarType::Float, [&](auto gradient, auto average) {
          using G = decltype(gradient);
          using E = decltype(average);
          FASTMETA_BEST(align_tile<G, E>)
          (reinterpret_cast<const G*>(run[0]), reinterpret_cast<const G*>(run[1]), reinterpret_cast<E*>(run[2]),
           reinterpret_cast<E*>(run[3]), reinterpret_cast<G*>(run[4]), &numbers, count, stream);
        });
      },
      [stream] { store_fence(stream); });
}

namespace {

void alignment_direction_(const std::vector<Tensor>& grads_labeled, const std::vector<Tensor>& grads_unlabeled,
                          const std::vector<Tensor>& ema_labeled, const std::vector<Tensor>& ema_fourth,
                          const std::vector<Tensor>& out, double decay, double decay_norm, double epsilon) {
  const auto tensors =
      list_tensors<5>({&grads_labeled, &grads_unlabeled, &ema_labeled, &ema_fourth, &out}, alignment_names);
  const AlignmentNumbers numbers = {decay, decay_norm, epsilon};
  check_alignment(tensors.data(), out.size(), numbers);
  align(tensors.data(), out.size(), numbers);
}

}  // namespace
}  // namespace fastmeta

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) {
  m.impl("alignment_direction_", TORCH_BOX(&fastmeta::alignment_direction_));
}

#else

#include "cpu/convert.h"

namespace fastmeta::FASTMETA_TARGET {

// G: type of the gradients and the direction, E: of the averages.
template <class G, class E>
void align_tile(const G* __restrict grad_labeled, const G* __restrict grad_unlabeled, E* __restrict ema_labeled,
                E* __restrict ema_fourth, G* __restrict out, const AlignmentNumbers* constants, int64_t count,
                bool stream) {
  using W = typename Wide<G>::type;
  const W decay = constants->decay, decay_norm = constants->decay_norm, epsilon = constants->epsilon;
  const W fresh = 1 - constants->decay, fresh_norm = 1 - constants->decay_norm;
  alignas(64) G direction[block_elements];
  for (int64_t i = 0; i < count; ++i) {
    const W mean = decay * widen(ema_labeled[i]) + fresh * widen(grad_labeled[i]);
    const W v = mean - widen(grad_unlabeled[i]);
    const W square = v * v;
    const W fourth = decay_norm * widen(ema_fourth[i]) + fresh_norm * (square * square);
    ema_labeled[i] = round_to<E>(mean);
    ema_fourth[i] = round_to<E>(fourth);
    direction[i] = round_to<G>(2 * v / (epsilon + std::sqrt(fourth)));
  }
  store(out, direction, count * static_cast<int64_t>(sizeof(G)), stream);
}

}  // namespace fastmeta::FASTMETA_TARGET

#endif
