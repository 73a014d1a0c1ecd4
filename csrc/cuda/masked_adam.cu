// masked_adam_: an Adam step on the rows that `index` names, each once, with the sum of its gradients in the order of
// their positions. A row outside the table is left out: to raise, the host would have to wait for the device.
#include "masked_adam.h"

#include <torch/csrc/stable/ops.h>

#include <array>
#include <bit>
#include <limits>

#include "cuda/convert.h"

namespace fastmeta {
namespace {

// Up to here each position searches `index` itself, in one launch; beyond, `index` is sorted first.
constexpr int64_t searched = 4096;
constexpr int block_threads = 256;

// Element (i, j) lies at data + i * row + j * column.
template <class T>
struct TableView {
  T* data;
  int64_t row, column;

  __device__ T& at(int64_t i, int64_t j) const { return data[i * row + j * column]; }
};

// T: type of the table and the gradients, S: of the statistics.
template <class T, class S>
struct AdamStep {
  using W = typename Wide<T>::type;

  int64_t count, rows, columns;  // n, M, C
  TableView<T> table;
  TableView<S> exp_avg, exp_avg_sq;
  TableView<int32_t> steps;
  TableView<const T> grad;
  TableView<const int64_t> index;
  const int64_t* order;  // positions whose rows ascend, as `index` then does; or null
  W lr, beta1, beta2, fresh1, fresh2, eps, low, high;
  double log_beta1, log_beta2;

  __device__ bool in_table(int64_t row) const { return row >= 0 && row < rows; }
};

// What all columns of a row share.
template <class W>
struct Unbias {
  W first, second;

  // t: updates the row has had, this one included. In float64: 1 - beta^t has few digits while t is small.
  template <class T, class S>
  __device__ Unbias(const AdamStep<T, S>& a, int32_t t)
      : first(static_cast<W>(-::expm1(t * a.log_beta1))), second(static_cast<W>(-::expm1(t * a.log_beta2))) {}
};

__device__ __forceinline__ int32_t next_count(int32_t t) { return t < INT32_MAX ? t + 1 : t; }

template <class T, class S, class W>
__device__ __forceinline__ void step_entry(const AdamStep<T, S>& a, int64_t row, int64_t c, W g,
                                           const Unbias<W>& unbias) {
  const W m = a.beta1 * widen(a.exp_avg.at(row, c)) + a.fresh1 * g;
  const W v = a.beta2 * widen(a.exp_avg_sq.at(row, c)) + a.fresh2 * g * g;
  W w = widen(a.table.at(row, c)) - a.lr * (m / unbias.first) / (std::sqrt(v / unbias.second) + a.eps);
  w = w < a.low ? a.low : w;  // NaN stays NaN
  w = w > a.high ? a.high : w;
  a.table.at(row, c) = round_to<T>(w);
  a.exp_avg.at(row, c) = round_to<S>(m);
  a.exp_avg_sq.at(row, c) = round_to<S>(v);
}

// The first of 128 positions from `begin` on, below `end`, whose chunk of 128 names `row`; `end` if none does. For all
// lanes of a warp.
template <class T, class S>
__device__ __forceinline__ int64_t find_chunk(const AdamStep<T, S>& a, int64_t row, int64_t begin, int64_t end,
                                              int lane) {
  for (; begin < end; begin += 128) {
    bool found = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t position = begin + 32 * i + lane;
      found = found || (position < end && a.index.at(position, 0) == row);
    }
    if (__any_sync(0xffffffffu, found)) return begin;
  }
  return end;
}

// A warp for each position; the first of a row steps, the others leave.
template <class T, class S>
__global__ void __launch_bounds__(block_threads, 4) step_searching(FASTMETA_STRUCTURE(AdamStep<T, S>) a) {
  using W = typename AdamStep<T, S>::W;
  const int64_t position = (blockIdx.x * int64_t{block_threads} + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (position >= a.count) return;
  const int64_t row = a.index.at(position, 0);
  if (!a.in_table(row) || find_chunk(a, row, 0, position, lane) < position) return;
  const int64_t repeated = find_chunk(a, row, position + 1, a.count, lane);
  const int32_t t = next_count(a.steps.at(row, 0));
  __syncwarp();  // all have read it
  if (lane == 0) a.steps.at(row, 0) = t;
  const Unbias<W> unbias(a, t);
  for (int64_t begin = 0; begin < a.columns; begin += 32) {
    const int64_t c = begin + lane;
    const bool inside = c < a.columns;
    W g = inside ? widen(a.grad.at(position, c)) : W{0};
    for (int64_t later = repeated; later < a.count; later += 32) {
      const bool same = later + lane < a.count && a.index.at(later + lane, 0) == row;
      for (unsigned left = __ballot_sync(0xffffffffu, same); left != 0; left &= left - 1) {
        if (inside) g += widen(a.grad.at(later + __ffs(static_cast<int>(left)) - 1, c));
      }
    }
    if (inside) step_entry(a, row, c, g, unbias);
  }
}

// `width` lanes for each position in the order of rows; the first of a row steps, with those that follow.
template <class T, class S>
__global__ void __launch_bounds__(block_threads, 4) step_sorted(FASTMETA_STRUCTURE(AdamStep<T, S>) a, int width) {
  using W = typename AdamStep<T, S>::W;
  const int64_t thread = blockIdx.x * int64_t{block_threads} + threadIdx.x;
  const int64_t place = thread / width;
  const int64_t row = place < a.count ? a.index.at(place, 0) : -1;
  const bool first = a.in_table(row) && (place == 0 || a.index.at(place - 1, 0) != row);
  const int32_t t = first ? next_count(a.steps.at(row, 0)) : 0;
  __syncwarp();  // all have read it
  if (!first) return;
  if (thread % width == 0) a.steps.at(row, 0) = t;
  const Unbias<W> unbias(a, t);
  for (int64_t c = thread % width; c < a.columns; c += width) {
    W g = widen(a.grad.at(a.order[place], c));
    for (int64_t next = place + 1; next < a.count && a.index.at(next, 0) == row; ++next) {
      g += widen(a.grad.at(a.order[next], c));
    }
    step_entry(a, row, c, g, unbias);
  }
}

// Rows in ascending order, those of one row as they came, and the positions they came from.
std::array<Tensor, 2> sorted(const Tensor& index) {
  std::array<StableIValue, 4> stack{torch::stable::detail::from(index),
                                    torch::stable::detail::from(std::optional<bool>(true)),
                                    torch::stable::detail::from(int64_t{0}), torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

template <class T>
TableView<T> matrix(const View& tensor) {
  return {static_cast<T*>(tensor.data()), tensor.stride(0), tensor.dim() > 1 ? tensor.stride(1) : 0};
}

dim3 blocks_for(int64_t threads) { return dim3(static_cast<unsigned>((threads + block_threads - 1) / block_threads)); }

template <class T, class S>
AdamStep<T, S> step_of(const MaskedAdam& x) {
  using W = typename Wide<T>::type;
  AdamStep<T, S> step{};
  step.count = x.index.size(0);
  step.rows = x.table.size(0);
  step.columns = x.table.dim() > 1 ? x.table.size(1) : 1;
  step.table = matrix<T>(x.table);
  step.exp_avg = matrix<S>(x.exp_avg);
  step.exp_avg_sq = matrix<S>(x.exp_avg_sq);
  step.steps = matrix<int32_t>(x.steps);
  step.grad = matrix<const T>(x.grad);
  step.index = matrix<const int64_t>(x.index);
  step.lr = static_cast<W>(x.lr);
  step.beta1 = static_cast<W>(x.beta1);
  step.beta2 = static_cast<W>(x.beta2);
  step.fresh1 = static_cast<W>(1 - x.beta1);
  step.fresh2 = static_cast<W>(1 - x.beta2);
  step.eps = static_cast<W>(x.eps);
  step.low = static_cast<W>(x.low);
  step.high = static_cast<W>(x.high);
  step.log_beta1 = std::log(x.beta1);
  step.log_beta2 = std::log(x.beta2);
  return step;
}

// Calls f with the step for the types of the arguments.
template <class F>
void with_step(const MaskedAdam& x, const F& f) {
  if (x.index.size(0) == 0 || (x.table.dim() > 1 && x.table.size(1) == 0)) return;
  const bool wide = x.exp_avg.scalar_type() == ScalarType::Float;
  switch (x.table.scalar_type()) {
    case ScalarType::Float:
      return f(step_of<float, float>(x));
    case ScalarType::Double:
      return f(step_of<double, double>(x));
    case ScalarType::BFloat16:
      return wide ? f(step_of<Bfloat16, float>(x)) : f(step_of<Bfloat16, Bfloat16>(x));
    default:
      return wide ? f(step_of<Float16, float>(x)) : f(step_of<Float16, Float16>(x));
  }
}

template <class T, class S>
void run_searching(const Launcher& launch, const AdamStep<T, S>& step) {
  launch(step_searching<T, S>, {.blocks = blocks_for(step.count * 32), .threads = dim3(block_threads)}, step);
}

template <class T, class S>
void run_sorted(const Launcher& launch, AdamStep<T, S> step, const std::array<Tensor, 2>& ascending) {
  step.index = matrix<const int64_t>(TensorView(ascending[0]));
  step.order = static_cast<const int64_t*>(ascending[1].data_ptr());
  const auto width = static_cast<int>(std::bit_ceil(static_cast<uint64_t>(step.columns < 32 ? step.columns : 32)));
  launch(step_sorted<T, S>, {.blocks = blocks_for(step.count * width), .threads = dim3(block_threads)}, step, width);
}

void masked_adam_tensors(const Tensor& table, const Tensor& index, const Tensor& grad, const Tensor& exp_avg,
                         const Tensor& exp_avg_sq, const Tensor& steps, double lr, double beta1, double beta2,
                         double eps, std::optional<double> low, std::optional<double> high) {
  const MaskedAdamTensors arguments(table, index, grad, exp_avg, exp_avg_sq, steps, lr, beta1, beta2, eps, low, high);
  const int device = View(arguments.views[0]).device_index();
  void* const stream = current_stream(device);
  if (arguments.run(cuda::masked_adam_, stream)) return;
  const MaskedAdam x = arguments.checked();
  const std::array<Tensor, 2> ascending = sorted(index);
  const Launcher launch("masked_adam_", device, stream);
  with_step(x, [&](const auto& step) { run_sorted(launch, step, ascending); });
}

}  // namespace

bool cuda::masked_adam_(const DLTensor* const* tensors, const double* numbers, DLTensor* const*, void* stream) {
  const MaskedAdam x(tensors, numbers);
  if (x.index.size(0) > searched) return false;  // to be sorted first, by torch
  const Launcher launch("masked_adam_", x.table.device_index(), stream);
  with_step(x, [&](const auto& step) { run_searching(launch, step); });
  return true;
}

}  // namespace fastmeta

STABLE_TORCH_LIBRARY_IMPL(FASTMETA_NAMESPACE, FASTMETA_DEVICE_KEY, m) {
  m.impl("masked_adam_", TORCH_BOX(&fastmeta::masked_adam_tensors));
}
