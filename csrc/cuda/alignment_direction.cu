// alignment_direction: both running averages and the direction in one pass.
#include "cuda/tensor_list.h"
#include "list_checks.h"

namespace fastmeta {
namespace {

// G: type of the gradients and the direction, E: of the averages.
template <class G, class E>
struct Align {
  // Of grad_labeled, grad_unlabeled, ema_labeled, ema_fourth, out.
  FASTMETA_HOST_DEVICE static constexpr int size(int k) { return k == 2 || k == 3 ? sizeof(E) : sizeof(G); }
  static constexpr int ahead = 1;
  using W = typename Wide<G>::type;
  template <int V>
  struct Loaded {
    Pack<G, V> labeled, unlabeled;
    Pack<E, V> mean, fourth;
  };
  W decay, fresh, decay_norm, fresh_norm, epsilon;

  __device__ __forceinline__ explicit Align(const AlignmentNumbers& c)
      : decay(static_cast<W>(c.decay)),
        fresh(static_cast<W>(1 - c.decay)),
        decay_norm(static_cast<W>(c.decay_norm)),
        fresh_norm(static_cast<W>(1 - c.decay_norm)),
        epsilon(static_cast<W>(c.epsilon)) {}

  template <int V>
  __device__ __forceinline__ Loaded<V> load(char* const (&at)[5]) const {
    return {fastmeta::load<V>(reinterpret_cast<const G*>(at[0])), fastmeta::load<V>(reinterpret_cast<const G*>(at[1])),
            fastmeta::load<V>(reinterpret_cast<const E*>(at[2])), fastmeta::load<V>(reinterpret_cast<const E*>(at[3]))};
  }
  template <int V>
  __device__ __forceinline__ void store(const Loaded<V>& loaded, char* const (&at)[5]) const {
    Pack<E, V> means, fourths;
    Pack<G, V> direction;
    for (int i = 0; i < V; ++i) {  // fma: one rounding whichever way the elements are walked
      const W mean = fma(decay, widen(loaded.mean.value[i]), fresh * widen(loaded.labeled.value[i]));
      const W v = mean - widen(loaded.unlabeled.value[i]);
      const W square = v * v;
      const W fourth = fma(decay_norm, widen(loaded.fourth.value[i]), fresh_norm * (square * square));
      means.value[i] = round_to<E>(mean);
      fourths.value[i] = round_to<E>(fourth);
      direction.value[i] = round_to<G>(2 * v / (epsilon + sqrt(fourth)));
    }
    fastmeta::store(reinterpret_cast<E*>(at[2]), means);
    fastmeta::store(reinterpret_cast<E*>(at[3]), fourths);
    fastmeta::store(reinterpret_cast<G*>(at[4]), direction);
  }
};

template <class G, class E>
__device__ __forceinline__ void align_chunk(const Chunk<5>& chunk, const int64_t* words,
                                            const AlignmentNumbers& constants) {
  const Align<G, E> align(constants);
  run_chunk(align, chunk, words);
}

constexpr int float32_averages = 8;  // added to the kind of 16-bit gradients

template <class Table>
__global__ void __launch_bounds__(list_threads, 3)
    align_kernel(FASTMETA_STRUCTURE(Table) table, AlignmentNumbers constants) {
  const auto chunk = chunk_of(table, blockIdx.x);
  switch (chunk.entry.kind) {
    case static_cast<int>(Kind::float32):
      return align_chunk<float, float>(chunk, table.words, constants);
    case static_cast<int>(Kind::bfloat16):
      return align_chunk<Bfloat16, Bfloat16>(chunk, table.words, constants);
    case static_cast<int>(Kind::float16):
      return align_chunk<Float16, Float16>(chunk, table.words, constants);
    case static_cast<int>(Kind::bfloat16) + float32_averages:
      return align_chunk<Bfloat16, float>(chunk, table.words, constants);
    case static_cast<int>(Kind::float16) + float32_averages:
      return align_chunk<Float16, float>(chunk, table.words, constants);
    default:
      return align_chunk<double, double>(chunk, table.words, constants);
  }
}

}  // namespace

void align(const ListTensor* tensors, size_t count, const AlignmentNumbers& numbers) {
  if (count == 0) return;
  ChunkList<5> list;
  list.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const ListTensor* place = tensors + 5 * i;
    const bool wide = place[2].type != place[0].type;
    add_tensors<5>(list, {place, place + 1, place + 2, place + 3, place + 4},
                   kind_of(place[0]) + (wide ? float32_averages : 0));
  }
  const Launcher launch("alignment_direction_", tensors[0].device);
  list.for_each_table([&]<class Table>(const Table& table, bool) {
    launch(align_kernel<Table>, {table.chunks, list_threads}, table, numbers);
  });
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

STABLE_TORCH_LIBRARY_IMPL(FASTMETA_NAMESPACE, FASTMETA_DEVICE_KEY, m) {
  m.impl("alignment_direction_", TORCH_BOX(&fastmeta::alignment_direction_));
}
