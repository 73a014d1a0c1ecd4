// masked_adam_: an Adam step on the rows that `index` names, each once, with the sum of its gradients.
#ifndef FASTMETA_TARGET

#include "masked_adam.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>

#include "cpu/buffer.h"
#include "cpu/isa.h"
#include "element_types.h"

namespace fastmeta {
namespace {

// Entries updated together: few enough that what they were gathered from is still near when they are written back.
constexpr int kLanes = 64;
// The rows of a batch lie anywhere in the table: their memory is asked for so many rows before their turn. Not earlier:
// four pages a row would be forgotten again by the translation buffers.
constexpr int64_t kAhead = 16;

// beta^t from its powers by hexadecimal digits: exact to a few units, and cheaper than pow for every row.
class Powers {
 public:
  explicit Powers(double beta) : beta_(beta) {
    double step = beta;
    for (auto& digit : digits_) {
      digit[0] = 1;
      for (int i = 1; i < 16; ++i) digit[i] = digit[i - 1] * step;
      step *= digit[15];
    }
  }
  double operator()(uint32_t t) const {
    if (t < 256) return digits_[0][t & 15] * digits_[1][t >> 4];
    if (t >> 16) return std::pow(beta_, t);
    return digits_[0][t & 15] * digits_[1][t >> 4 & 15] * (digits_[2][t >> 8 & 15] * digits_[3][t >> 12]);
  }

 private:
  double beta_;
  std::array<std::array<double, 16>, 4> digits_;
};

struct AdamSettings {
  double lr, beta1, beta2, eps, low, high;
  Powers power1, power2;
};

// Rows and columns of a table, in bytes.
struct TableView {
  char* data;
  int64_t row, column;

  explicit TableView(const View& tensor)
      : data(static_cast<char*>(tensor.data())),
        row(tensor.stride(0) * tensor.element_size()),
        column(tensor.dim() > 1 ? tensor.stride(1) * tensor.element_size() : 0) {}
  FASTMETA_INLINE char* at(int64_t r, int64_t c) const { return data + r * row + c * column; }
};

// A count of columns known when compiled: the common table of one number for each example, without gaps, has no loops
// over columns and no products with strides.
using One = std::integral_constant<int, 1>;

template <class T>
FASTMETA_INLINE char* at(const TableView& matrix, int64_t r, int64_t, One) {
  return matrix.data + r * static_cast<int64_t>(sizeof(T));
}
template <class T>
FASTMETA_INLINE char* at(const TableView& matrix, int64_t r, int64_t c, int) {
  return matrix.at(r, c);
}

// What a step reads and writes by row.
struct TableRows {
  TableView table, exp_avg, exp_avg_sq, steps;

  FASTMETA_INLINE void prefetch(int64_t row) const {
    __builtin_prefetch(table.at(row, 0), 1);
    __builtin_prefetch(exp_avg.at(row, 0), 1);
    __builtin_prefetch(exp_avg_sq.at(row, 0), 1);
    __builtin_prefetch(steps.at(row, 0), 1);
  }
};

// The rows of a call without repetition, in order of first appearance, with the positions of their gradients.
class Unique {
 public:
  int64_t count = 0;

  Unique(const char* index, int64_t stride, int64_t n)
      : shift_(64 - std::bit_width(static_cast<uint64_t>(4 * n))),
        row_(n),
        position_(n),
        next_(n),
        last_(n),
        place_(int64_t{1} << (64 - shift_)) {
    const int64_t mask = (int64_t{1} << (64 - shift_)) - 1;
    std::fill_n(place_.data(), mask + 1, -1);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t r = *reinterpret_cast<const int64_t*>(index + i * stride);
      auto slot = static_cast<int64_t>(static_cast<uint64_t>(r) * 0x9e3779b97f4a7c15u >> shift_);
      int32_t u = place_.data()[slot];
      while (u >= 0 && row_.data()[u] != r) u = place_.data()[slot = (slot + 1) & mask];
      if (u >= 0) {
        chain(u, static_cast<int32_t>(i), n);
        continue;
      }
      place_.data()[slot] = static_cast<int32_t>(count);
      row_.data()[count] = r;
      position_.data()[count] = static_cast<int32_t>(i);
      if (repeats_) last_.data()[count] = static_cast<int32_t>(i);
      ++count;
    }
  }

  int64_t row(int64_t u) const { return row_.data()[u]; }
  int32_t position(int64_t u) const { return position_.data()[u]; }
  // The position after this one with the same row, or -1.
  int32_t next(int32_t position) const { return repeats_ ? next_.data()[position] : -1; }

 private:
  void chain(int32_t u, int32_t position, int64_t n) {
    if (!repeats_) {
      std::fill_n(next_.data(), n, -1);
      std::copy_n(position_.data(), count, last_.data());
    }
    repeats_ = true;
    last_.data()[u] = next_.data()[last_.data()[u]] = position;
  }

  bool repeats_ = false;
  const int shift_;  // of a hash
  const Buffer<int64_t> row_;
  const Buffer<int32_t> position_, next_, last_;  // next by position, the others as the rows
  const Buffer<int32_t> place_;                   // by hash
};

struct Task {
  TableRows rows;
  TableView grad;
  int64_t columns;
  const Unique& unique;
  const AdamSettings& settings;
};

}  // namespace
}  // namespace fastmeta

#define FASTMETA_KERNELS "cpu/masked_adam.cpp"
#include "cpu/targets.h"

namespace fastmeta {
namespace {

void check_rows(const char* index, int64_t stride, int64_t n, int64_t rows) {
  bool inside = true;
  for (int64_t i = 0; i < n; ++i) {
    const auto row = *reinterpret_cast<const uint64_t*>(index + i * stride);  // a negative one is very large
    inside &= row < static_cast<uint64_t>(rows);
  }
  STD_TORCH_CHECK(inside, "index must be rows in [0, ", rows, ")");
}

template <class T, class S>
void run_step(const Task& task) {
  const auto step = FASTMETA_BEST(AdamStep<T, S>::run);
  const int64_t grain = std::max<int64_t>(1, 8192 / task.columns);
  if (task.unique.count <= grain) return step(&task, 0, task.unique.count);
  torch::stable::parallel_for(0, task.unique.count, grain,
                              [&](int64_t begin, int64_t end) { step(&task, begin, end); });
}

}  // namespace

bool masked_adam_(const DLTensor* const* tensors, const double* numbers, DLTensor* const*, void*) {
  const MaskedAdam x(tensors, numbers);
  const int64_t n = x.index.size(0), columns = x.table.dim() > 1 ? x.table.size(1) : 1;
  const auto* rows = static_cast<const char*>(x.index.data());
  const int64_t stride = x.index.stride(0) * static_cast<int64_t>(sizeof(int64_t));
  check_rows(rows, stride, n, x.table.size(0));
  if (n == 0 || columns == 0) return true;
  const AdamSettings settings = {x.lr, x.beta1, x.beta2, x.eps, x.low, x.high, Powers(x.beta1), Powers(x.beta2)};
  const TableRows all = {TableView(x.table), TableView(x.exp_avg), TableView(x.exp_avg_sq), TableView(x.steps)};
  const Unique unique(rows, stride, n);
  const Task task = {all, TableView(x.grad), columns, unique, settings};
  const bool wide = x.exp_avg.scalar_type() == ScalarType::Float;
  with_averages(x.table.scalar_type(), wide,
                [&](auto entry, auto statistic) { run_step<decltype(entry), decltype(statistic)>(task); });
  return true;
}

static void masked_adam_tensors(const Tensor& table, const Tensor& index, const Tensor& grad, const Tensor& exp_avg,
                                const Tensor& exp_avg_sq, const Tensor& steps, double lr, double beta1, double beta2,
                                double eps, std::optional<double> low, std::optional<double> high) {
  MaskedAdamTensors(table, index, grad, exp_avg, exp_avg_sq, steps, lr, beta1, beta2, eps, low, high)
      .run(masked_adam_, nullptr);
}

}  // namespace fastmeta

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) { m.impl("masked_adam_", TORCH_BOX(&fastmeta::masked_adam_tensors)); }

#else

#include "cpu/convert.h"

namespace fastmeta::FASTMETA_TARGET {

template <class T, class W>
FASTMETA_INLINE void load(const char* from, int64_t stride, auto count, W* __restrict to) {
  if (stride == static_cast<int64_t>(sizeof(T))) {
    for (int i = 0; i < count; ++i) to[i] = widen(reinterpret_cast<const T*>(from)[i]);
  } else {
    for (int i = 0; i < count; ++i) to[i] = widen(*reinterpret_cast<const T*>(from + i * stride));
  }
}

template <class T, class W>
FASTMETA_INLINE void save(char* to, int64_t stride, auto count, const W* __restrict from) {
  if (stride == static_cast<int64_t>(sizeof(T))) {
    for (int i = 0; i < count; ++i) reinterpret_cast<T*>(to)[i] = round_to<T>(from[i]);
  } else {
    for (int i = 0; i < count; ++i) *reinterpret_cast<T*>(to + i * stride) = round_to<T>(from[i]);
  }
}

// T: type of the table and the gradients, S: of the statistics.
template <class T, class S>
struct AdamStep {
  using W = typename Wide<T>::type;
  struct Lanes {
    alignas(64) W w[kLanes], m[kLanes], v[kLanes], g[kLanes], unbias1[kLanes], unbias2[kLanes];
  };

  static FASTMETA_INLINE void update(Lanes& lanes, int count, const AdamSettings& settings) {
    const W beta1 = settings.beta1, beta2 = settings.beta2, fresh1 = 1 - settings.beta1, fresh2 = 1 - settings.beta2;
    const W lr = settings.lr, eps = settings.eps, low = settings.low, high = settings.high;
    for (int i = 0; i < count; ++i) {
      const W g = lanes.g[i];
      const W m = beta1 * lanes.m[i] + fresh1 * g;
      const W v = beta2 * lanes.v[i] + fresh2 * g * g;
      W w = lanes.w[i] - lr * (m / lanes.unbias1[i]) / (std::sqrt(v / lanes.unbias2[i]) + eps);
      w = w < low ? low : w;  // NaN stays NaN
      w = w > high ? high : w;
      lanes.w[i] = w;
      lanes.m[i] = m;
      lanes.v[i] = v;
    }
  }

  static void run(const Task* task, int64_t begin, int64_t end) {
    Lanes lanes;
    for (int64_t u = begin; u < std::min(begin + kAhead, end); ++u) task->rows.prefetch(task->unique.row(u));
    if (task->columns == 1 && is_packed(*task)) {
      for (int64_t first = begin; first < end; first += kLanes) {
        step_rows(*task, first, std::min<int64_t>(first + kLanes, end), end, 0, One(), lanes);
      }
      return;
    }
    const int64_t width = std::min<int64_t>(task->columns, kLanes), rows = kLanes / width;
    for (int64_t first = begin; first < end; first += rows) {
      for (int64_t c = 0; c < task->columns; c += width) {
        const auto count = static_cast<int>(std::min(width, task->columns - c));
        step_rows(*task, first, std::min(first + rows, end), end, c, count, lanes);
      }
    }
  }

  static bool is_packed(const Task& task) {
    const TableRows& rows = task.rows;
    return rows.table.row == sizeof(T) && task.grad.row == sizeof(T) && rows.exp_avg.row == sizeof(S) &&
           rows.exp_avg_sq.row == sizeof(S) && rows.steps.row == sizeof(int32_t);
  }

  // Columns [c, c + count) of the rows [first, last); rows before `end` are still to come.
  static FASTMETA_INLINE void step_rows(const Task& task, int64_t first, int64_t last, int64_t end, int64_t c,
                                        auto count, Lanes& lanes) {
    for (int64_t u = first; u < last; ++u) {
      if (c == 0 && u + kAhead < end) task.rows.prefetch(task.unique.row(u + kAhead));
      gather(task, u, c, count, lanes, static_cast<int>(u - first) * count);
    }
    update(lanes, static_cast<int>(last - first) * count, task.settings);
    for (int64_t u = first; u < last; ++u) scatter(task, u, c, count, lanes, static_cast<int>(u - first) * count);
  }

  static FASTMETA_INLINE void gather(const Task& task, int64_t u, int64_t c, auto count, Lanes& lanes, int lane) {
    const int64_t row = task.unique.row(u);
    load<T>(at<T>(task.rows.table, row, c, count), task.rows.table.column, count, lanes.w + lane);
    load<S>(at<S>(task.rows.exp_avg, row, c, count), task.rows.exp_avg.column, count, lanes.m + lane);
    load<S>(at<S>(task.rows.exp_avg_sq, row, c, count), task.rows.exp_avg_sq.column, count, lanes.v + lane);
    int32_t i = task.unique.position(u);
    load<T>(at<T>(task.grad, i, c, count), task.grad.column, count, lanes.g + lane);
    while ((i = task.unique.next(i)) >= 0) {
      const char* g = at<T>(task.grad, i, c, count);
      for (int j = 0; j < count; ++j) {
        lanes.g[lane + j] += widen(*reinterpret_cast<const T*>(g + j * task.grad.column));
      }
    }
    auto& steps = *reinterpret_cast<int32_t*>(at<int32_t>(task.rows.steps, row, 0, count));
    if (c == 0 && steps < std::numeric_limits<int32_t>::max()) ++steps;
    const auto t = static_cast<uint32_t>(steps);
    const W unbias1 = 1 - task.settings.power1(t), unbias2 = 1 - task.settings.power2(t);
    for (int j = 0; j < count; ++j) {
      lanes.unbias1[lane + j] = unbias1;
      lanes.unbias2[lane + j] = unbias2;
    }
  }

  static FASTMETA_INLINE void scatter(const Task& task, int64_t u, int64_t c, auto count, Lanes& lanes, int lane) {
    const int64_t row = task.unique.row(u);
    save<T>(at<T>(task.rows.table, row, c, count), task.rows.table.column, count, lanes.w + lane);
    save<S>(at<S>(task.rows.exp_avg, row, c, count), task.rows.exp_avg.column, count, lanes.m + lane);
    save<S>(at<S>(task.rows.exp_avg_sq, row, c, count), task.rows.exp_avg_sq.column, count, lanes.v + lane);
  }
};

}  // namespace fastmeta::FASTMETA_TARGET

#endif
