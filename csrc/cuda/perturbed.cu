// perturbed: the norm of a direction, theta = saved +- epsilon v in one pass, and the way back. The host never waits.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>

#include "cuda/tensor_list.h"
#include "list_checks.h"

namespace fastmeta {
namespace {

// The beginning of the backup. The host cannot read whether it holds parameters, so the kernels do: filling a full
// backup moves from what it holds, moving from an empty one and restoring from one do nothing.
struct Mark {
  int32_t holds;
  uint32_t blocks_ended;
};
static_assert(sizeof(Mark) <= backup_align);

// After a block's last use of the mark: the last block of a launch changes it, when all have read it.
__device__ __forceinline__ void end_and_mark(Mark* mark, bool holds) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence();
  if (atomicAdd(&mark->blocks_ended, 1u) != gridDim.x - 1) return;
  mark->holds = holds;
  mark->blocks_ended = 0;
}

template <class T>
struct SumOfSquares {
  FASTMETA_HOST_DEVICE static constexpr int size(int) { return sizeof(T); }
  static constexpr int ahead = 4;
  double sum = 0;

  template <int V>
  __device__ __forceinline__ Pack<T, V> load(char* const (&at)[1]) const {
    return fastmeta::load<V>(reinterpret_cast<const T*>(at[0]));
  }
  template <int V>
  __device__ __forceinline__ void store(const Pack<T, V>& v, char* const (&)[1]) {
    for (int i = 0; i < V; ++i) {
      const double x = widen(v.value[i]);
      sum = fma(x, x, sum);
    }
  }
};

// The sum over a block's threads, always in one order; thread 0 has it.
__device__ __forceinline__ double block_sum(double sum) {
  constexpr int most_warps = 32;
  FASTMETA_SHARED(double, sums, most_warps);
  for (int lane = 16; lane > 0; lane /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return 0;
  double total = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total += sums[warp];
  return total;
}

template <class T, int K>
__device__ __forceinline__ double square_chunk(const Chunk<K>& chunk, const int64_t* words) {
  SumOfSquares<T> squares;
  run_chunk(squares, chunk, words);
  return squares.sum;
}

// sums [chunks of all launches].
template <class Table>
__global__ void __launch_bounds__(list_threads, 4) square_kernel(FASTMETA_STRUCTURE(Table) table, double* sums) {
  const auto chunk = chunk_of(table, blockIdx.x);
  double sum;
  switch (static_cast<Kind>(chunk.entry.kind)) {
    case Kind::float32:
      sum = square_chunk<float>(chunk, table.words);
      break;
    case Kind::bfloat16:
      sum = square_chunk<Bfloat16>(chunk, table.words);
      break;
    case Kind::float16:
      sum = square_chunk<Float16>(chunk, table.words);
      break;
    default:
      sum = square_chunk<double>(chunk, table.words);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[table.chunks_before + blockIdx.x] = sum;
}

constexpr int epsilon_threads = 1024;

// epsilon [] = radius / ||v||, or radius where the norm is 0.
__global__ void __launch_bounds__(epsilon_threads)
    epsilon_kernel(const double* sums, int64_t chunks, double radius, void* epsilon, bool in_double) {
  double sum = 0;
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += epsilon_threads) sum += sums[chunk];
  sum = block_sum(sum);
  if (threadIdx.x != 0) return;
  const double quotient = radius / (sum == 0 ? 1.0 : sqrt(sum));
  // A finite factor: infinity times an entry that does not move would be NaN.
  if (in_double) {
    constexpr double most = std::numeric_limits<double>::max();
    *static_cast<double*>(epsilon) = quotient > most ? most : quotient;
  } else {
    constexpr double most = std::numeric_limits<float>::max();
    *static_cast<float*>(epsilon) = static_cast<float>(quotient > most ? most : quotient);
  }
}

// theta <- saved + factor v; with `save`, saved <- theta before.
template <class T, bool save>
struct Move {
  FASTMETA_HOST_DEVICE static constexpr int size(int) { return sizeof(T); }  // theta, v, saved
  static constexpr int ahead = 2;
  using W = typename Wide<T>::type;
  template <int V>
  struct Loaded {
    Pack<T, V> start, v;
  };
  W factor;

  template <int V>
  __device__ __forceinline__ Loaded<V> load(char* const (&at)[3]) const {
    return {fastmeta::load<V>(reinterpret_cast<const T*>(at[save ? 0 : 2])),
            fastmeta::load<V>(reinterpret_cast<const T*>(at[1]))};
  }
  template <int V>
  __device__ __forceinline__ void store(const Loaded<V>& loaded, char* const (&at)[3]) const {
    Pack<T, V> moved;
    for (int i = 0; i < V; ++i) {
      moved.value[i] = round_to<T>(fma(factor, widen(loaded.v.value[i]), widen(loaded.start.value[i])));
    }
    if (save) fastmeta::store(reinterpret_cast<T*>(at[2]), loaded.start);
    fastmeta::store(reinterpret_cast<T*>(at[0]), moved);
  }
};

template <class T>
__device__ __forceinline__ void move_chunk(const Chunk<3>& chunk, const int64_t* words, double factor, bool save) {
  const auto wide = static_cast<typename Wide<T>::type>(factor);
  if (save) {
    Move<T, true> move{wide};
    run_chunk(move, chunk, words);
  } else {
    Move<T, false> move{wide};
    run_chunk(move, chunk, words);
  }
}

template <class Table>
__global__ void __launch_bounds__(list_threads, 4)
    perturb_kernel(FASTMETA_STRUCTURE(Table) table, const void* epsilon, bool in_double, double sign, bool save,
                   Mark* mark, bool last) {
  const bool holds = mark->holds != 0;
  if (save || holds) {
    const auto chunk = chunk_of(table, blockIdx.x);
    const double factor =
        sign * (in_double ? *static_cast<const double*>(epsilon) : *static_cast<const float*>(epsilon));
    const bool fill = save && !holds;
    switch (static_cast<Kind>(chunk.entry.kind)) {
      case Kind::float32:
        move_chunk<float>(chunk, table.words, factor, fill);
        break;
      case Kind::bfloat16:
        move_chunk<Bfloat16>(chunk, table.words, factor, fill);
        break;
      case Kind::float16:
        move_chunk<Float16>(chunk, table.words, factor, fill);
        break;
      default:
        move_chunk<double>(chunk, table.words, factor, fill);
    }
  }
  if (save && last) end_and_mark(mark, true);
}

// theta <- saved, as bits.
template <class T>
struct Restore {
  FASTMETA_HOST_DEVICE static constexpr int size(int) { return sizeof(T); }  // theta, saved
  static constexpr int ahead = 4;

  template <int V>
  __device__ __forceinline__ Pack<T, V> load(char* const (&at)[2]) const {
    return fastmeta::load<V>(reinterpret_cast<const T*>(at[1]));
  }
  template <int V>
  __device__ __forceinline__ void store(const Pack<T, V>& saved, char* const (&at)[2]) const {
    fastmeta::store(reinterpret_cast<T*>(at[0]), saved);
  }
};

template <class T>
__device__ __forceinline__ void restore_chunk(const Chunk<2>& chunk, const int64_t* words) {
  Restore<T> restore;
  run_chunk(restore, chunk, words);
}

template <class Table>
__global__ void __launch_bounds__(list_threads, 4)
    restore_kernel(FASTMETA_STRUCTURE(Table) table, Mark* mark, bool last) {
  if (mark->holds != 0) {
    const auto chunk = chunk_of(table, blockIdx.x);
    switch (static_cast<Kind>(chunk.entry.kind)) {
      case Kind::float32:
        restore_chunk<uint32_t>(chunk, table.words);
        break;
      case Kind::float64:
        restore_chunk<uint64_t>(chunk, table.words);
        break;
      default:
        restore_chunk<uint16_t>(chunk, table.words);
    }
  }
  if (last) end_and_mark(mark, false);
}

void launch_epsilon(const ChunkList<1>& direction, double* sums, double radius, const ListTensor& epsilon) {
  const Launcher launch("perturb_epsilon", epsilon.device);
  direction.for_each_table([&]<class Table>(const Table& table, bool) {
    launch(square_kernel<Table>, {table.chunks, list_threads}, table, sums);
  });
  launch(epsilon_kernel, {1, epsilon_threads}, sums, direction.chunks(), radius, epsilon.data,
         epsilon.type == ScalarType::Double);
}

void launch_move(const ChunkList<3>& list, const ListTensor& epsilon, double sign, bool save, char* backup) {
  const Launcher launch("perturb_", epsilon.device);
  list.for_each_table([&]<class Table>(const Table& table, bool last) {
    launch(perturb_kernel<Table>, {table.chunks, list_threads}, table, epsilon.data, epsilon.type == ScalarType::Double,
           sign, save, reinterpret_cast<Mark*>(backup), last);
  });
}

void launch_restore(const ChunkList<2>& list, const ListTensor& backup) {
  const Launcher launch("perturb_restore_", backup.device);
  list.for_each_table([&]<class Table>(const Table& table, bool last) {
    launch(restore_kernel<Table>, {table.chunks, list_threads}, table, reinterpret_cast<Mark*>(backup.data), last);
  });
}

// theta, v, saved of [count, 2] theta, v.
ChunkList<3> moves(const ListTensor* tensors, size_t count, char* backup) {
  ChunkList<3> list;
  list.reserve(count);
  char* copy = backup + backup_align;
  for (size_t i = 0; i < count; ++i) {
    const ListTensor* place = tensors + 2 * i;
    add_tensors<3>(list, {place, place + 1, nullptr}, kind_of(place[0]), copy);
    copy += bytes_of_copy(place[0]);
  }
  return list;
}

// theta, saved of `count` parameters that lie `step` apart.
ChunkList<2> copies(const ListTensor* params, size_t count, size_t step, char* backup) {
  ChunkList<2> list;
  list.reserve(count);
  char* copy = backup + backup_align;
  for (size_t i = 0; i < count; ++i) {
    const ListTensor& theta = params[step * i];
    add_tensors<2>(list, {&theta, nullptr}, kind_of(theta), copy);
    copy += bytes_of_copy(theta);
  }
  return list;
}

// `count` directions that lie `step` apart.
ChunkList<1> directions(const ListTensor* direction, size_t count, size_t step) {
  ChunkList<1> list;
  list.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const ListTensor& v = direction[step * i];
    check_supported(v, "direction", i);
    check_same_device(v, "direction", i, direction[0], "direction[0]");
    add_tensors<1>(list, {&v}, kind_of(v));
  }
  return list;
}

class DevicePerturbation final : public Perturbation {
 public:
  DevicePerturbation(const ListTensor* tensors, size_t count, const ListTensor& backup, const ListTensor& epsilon)
      : backup_(backup),
        epsilon_(epsilon),
        directions_(directions(tensors + 1, count, 2)),
        moves_(moves(tensors, count, backup.data)),
        copies_(copies(tensors, count, 2, backup.data)) {}

  void enter(double radius) override {
    check_radius(radius);
    // The sums of the chunks lie where the copies will: a chunk's copy is larger than its sum.
    launch_epsilon(directions_, reinterpret_cast<double*>(backup_.data + backup_align), radius, epsilon_);
    launch_move(moves_, epsilon_, 1.0, true, backup_.data);
  }
  void move(double sign) override { launch_move(moves_, epsilon_, sign, false, backup_.data); }
  void restore() override { launch_restore(copies_, backup_); }
  void leave_out(const char* const* begin, const char* const* end) override {
    moves_.leave_out(begin, end);
    copies_.leave_out(begin, end);
  }

 private:
  ListTensor backup_, epsilon_;
  ChunkList<1> directions_;
  ChunkList<3> moves_;
  ChunkList<2> copies_;
};

}  // namespace

Perturbation* perturb(const ListTensor* tensors, size_t count, const ListTensor& backup, const ListTensor& epsilon) {
  check_perturb(tensors, count, epsilon);
  check_backup(backup, tensors, count, 2);
  return new DevicePerturbation(tensors, count, backup, epsilon);
}

const ListFunctions* fastmeta_list_functions() {
  static constexpr ListFunctions functions = {&check_alignment, &align, &perturb};
  return &functions;
}

namespace {

Tensor perturb_epsilon(const std::vector<Tensor>& direction, double radius) {
  check_radius(radius);
  if (direction.empty()) {  // and so no device
    Tensor epsilon = torch::stable::empty({}, ScalarType::Float);
    *static_cast<float*>(epsilon.data_ptr()) = static_cast<float>(radius);
    return epsilon;
  }
  const auto tensors = list_tensors<1>({&direction}, {"direction"});
  const auto in_double = [](const ListTensor& v) { return v.type == ScalarType::Double; };
  const bool any = std::any_of(tensors.begin(), tensors.end(), in_double);
  const auto list = directions(tensors.data(), tensors.size(), 1);
  const Tensor epsilon = torch::stable::new_empty(direction[0], {}, any ? ScalarType::Double : ScalarType::Float);
  const Tensor sums = torch::stable::new_empty(direction[0], {list.chunks()}, ScalarType::Double);
  launch_epsilon(list, static_cast<double*>(sums.data_ptr()), radius, list_tensor(epsilon));
  return epsilon;
}

void perturb_(const std::vector<Tensor>& params, const std::vector<Tensor>& direction, Tensor backup,
              const Tensor& epsilon, double sign, bool save) {
  const auto tensors = list_tensors<2>({&params, &direction}, {"params", "direction"});
  const ListTensor size = list_tensor(epsilon), saved = list_tensor(backup);
  check_finite(sign, "sign");
  check_perturb(tensors.data(), params.size(), size);
  check_backup(saved, tensors.data(), params.size(), 2);
  launch_move(moves(tensors.data(), params.size(), saved.data), size, sign, save, saved.data);
}

void perturb_restore_(const std::vector<Tensor>& params, Tensor backup) {
  const auto tensors = list_tensors<1>({&params}, {"params"});
  for (size_t i = 0; i < params.size(); ++i) check_supported(tensors[i], "params", i);
  const ListTensor saved = list_tensor(backup);
  check_backup(saved, tensors.data(), params.size(), 1);
  launch_restore(copies(tensors.data(), params.size(), 1, saved.data), saved);
}

}  // namespace
}  // namespace fastmeta

STABLE_TORCH_LIBRARY_IMPL(FASTMETA_NAMESPACE, FASTMETA_DEVICE_KEY, m) {
  m.impl("perturb_epsilon", TORCH_BOX(&fastmeta::perturb_epsilon));
  m.impl("perturb_", TORCH_BOX(&fastmeta::perturb_));
  m.impl("perturb_restore_", TORCH_BOX(&fastmeta::perturb_restore_));
}
