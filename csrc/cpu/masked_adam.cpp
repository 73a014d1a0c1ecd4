// masked_adam_: an Adam step on the rows that `index` names, each once, with the sum of its gradients.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>

#include "cpu/convert.h"
#include "cpu/tensor_list.h"
#include "masked_adam.h"

namespace fastmeta {
namespace {

constexpr int kLanes = 256;  // entries updated together
// The rows of a batch lie anywhere in the table, so their memory is asked for early: of the first ones, as many as fit
// the second cache, while duplicates are looked for, of all a few rows before their turn.
constexpr int64_t kEarly = 2048;
constexpr int64_t kAhead = 8;

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

struct Settings {
  double lr, beta1, beta2, eps, low, high;
  Powers power1, power2;
};

// Rows and columns of a table, in bytes.
struct Matrix {
  char* data;
  int64_t row, column;

  explicit Matrix(const Tensor& tensor)
      : data(static_cast<char*>(tensor.data_ptr())),
        row(tensor.stride(0) * static_cast<int64_t>(tensor.element_size())),
        column(tensor.dim() > 1 ? tensor.stride(1) * static_cast<int64_t>(tensor.element_size()) : 0) {}
  FASTMETA_INLINE char* at(int64_t r, int64_t c) const { return data + r * row + c * column; }
};

// A count of columns known when compiled: the common table of one number for each example, without gaps, has no loops
// over columns and no products with strides.
using One = std::integral_constant<int, 1>;

template <class T>
FASTMETA_INLINE char* at(const Matrix& matrix, int64_t r, int64_t, One) {
  return matrix.data + r * static_cast<int64_t>(sizeof(T));
}
template <class T>
FASTMETA_INLINE char* at(const Matrix& matrix, int64_t r, int64_t c, int) {
  return matrix.at(r, c);
}

// What a step reads and writes by row.
struct Rows {
  Matrix table, exp_avg, exp_avg_sq, steps;

  FASTMETA_INLINE void prefetch(int64_t row) const {
    __builtin_prefetch(table.at(row, 0), 1);
    __builtin_prefetch(exp_avg.at(row, 0), 1);
    __builtin_prefetch(exp_avg_sq.at(row, 0), 1);
    __builtin_prefetch(steps.at(row, 0), 1);
  }
};

// The rows of a call without repetition, in order of first appearance. The gradients of one row form a chain.
struct Unique {
  int64_t count = 0;
  std::unique_ptr<int64_t[]> row;
  std::unique_ptr<int32_t[]> head, next;  // next[i] < 0 ends a chain

  Unique(const char* index, int64_t stride, int64_t n, const Rows& rows)
      : row(std::make_unique_for_overwrite<int64_t[]>(n)),
        head(std::make_unique_for_overwrite<int32_t[]>(n)),
        next(std::make_unique_for_overwrite<int32_t[]>(n)) {
    const auto tail = std::make_unique_for_overwrite<int32_t[]>(n);
    const auto slots = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(2 * n)));
    const int shift = 64 - std::countr_zero(static_cast<uint64_t>(slots));
    const auto place = std::make_unique_for_overwrite<int32_t[]>(slots);
    std::fill_n(place.get(), slots, -1);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t r = *reinterpret_cast<const int64_t*>(index + i * stride);
      if (i < kEarly) rows.prefetch(r);
      uint64_t slot = static_cast<uint64_t>(r) * 0x9e3779b97f4a7c15u >> shift;
      while (place[slot] >= 0 && row[place[slot]] != r) slot = (slot + 1) & (slots - 1);
      next[i] = -1;
      if (place[slot] < 0) {
        place[slot] = static_cast<int32_t>(count);
        row[count] = r;
        head[count] = tail[count] = static_cast<int32_t>(i);
        ++count;
      } else {
        int32_t& last = tail[place[slot]];
        last = next[last] = static_cast<int32_t>(i);
      }
    }
  }
};

struct Task {
  Rows rows;
  Matrix grad;
  int64_t columns;
  const Unique& unique;
  const Settings& settings;
};

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
    for (int i = 0; i < count; ++i) reinterpret_cast<T*>(to)[i] = narrow<T>(from[i]);
  } else {
    for (int i = 0; i < count; ++i) *reinterpret_cast<T*>(to + i * stride) = narrow<T>(from[i]);
  }
}

// T: type of the table and the gradients, S: of the statistics.
template <class T, class S>
struct Step {
  using W = typename Wide<T>::type;
  struct Lanes {
    alignas(64) W w[kLanes], m[kLanes], v[kLanes], g[kLanes], unbias1[kLanes], unbias2[kLanes];
  };

  static FASTMETA_INLINE void update(Lanes& lanes, int count, const Settings& settings) {
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

  static FASTMETA_INLINE void run(const Task* task, int64_t begin, int64_t end) {
    Lanes lanes;
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
    const Rows& rows = task.rows;
    return rows.table.row == sizeof(T) && task.grad.row == sizeof(T) && rows.exp_avg.row == sizeof(S) &&
           rows.exp_avg_sq.row == sizeof(S) && rows.steps.row == sizeof(int32_t);
  }

  // Columns [c, c + count) of the rows [first, last); rows before `end` are still to come.
  static FASTMETA_INLINE void step_rows(const Task& task, int64_t first, int64_t last, int64_t end, int64_t c,
                                        auto count, Lanes& lanes) {
    for (int64_t u = first; u < last; ++u) {
      if (c == 0 && u + kAhead < end && u + kAhead >= kEarly) task.rows.prefetch(task.unique.row[u + kAhead]);
      gather(task, u, c, count, lanes, static_cast<int>(u - first) * count);
    }
    update(lanes, static_cast<int>(last - first) * count, task.settings);
    for (int64_t u = first; u < last; ++u) scatter(task, u, c, count, lanes, static_cast<int>(u - first) * count);
  }

  static FASTMETA_INLINE void gather(const Task& task, int64_t u, int64_t c, auto count, Lanes& lanes, int lane) {
    const int64_t row = task.unique.row[u];
    load<T>(at<T>(task.rows.table, row, c, count), task.rows.table.column, count, lanes.w + lane);
    load<S>(at<S>(task.rows.exp_avg, row, c, count), task.rows.exp_avg.column, count, lanes.m + lane);
    load<S>(at<S>(task.rows.exp_avg_sq, row, c, count), task.rows.exp_avg_sq.column, count, lanes.v + lane);
    int32_t i = task.unique.head[u];
    load<T>(at<T>(task.grad, i, c, count), task.grad.column, count, lanes.g + lane);
    while ((i = task.unique.next[i]) >= 0) {
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
    const int64_t row = task.unique.row[u];
    save<T>(at<T>(task.rows.table, row, c, count), task.rows.table.column, count, lanes.w + lane);
    save<S>(at<S>(task.rows.exp_avg, row, c, count), task.rows.exp_avg.column, count, lanes.m + lane);
    save<S>(at<S>(task.rows.exp_avg_sq, row, c, count), task.rows.exp_avg_sq.column, count, lanes.v + lane);
  }
};

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
  const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, task.columns));
  torch::stable::parallel_for(0, task.unique.count, grain,
                              [&](int64_t begin, int64_t end) { run_best<Step<T, S>>(&task, begin, end); });
}

void masked_adam_(const Tensor& table, const Tensor& index, const Tensor& grad, const Tensor& exp_avg,
                  const Tensor& exp_avg_sq, const Tensor& steps, double lr, double beta1, double beta2, double eps,
                  std::optional<double> low, std::optional<double> high) {
  check_masked_adam(table, index, grad, exp_avg, exp_avg_sq, steps);
  check_masked_adam(lr, beta1, beta2, eps, low, high);
  constexpr double infinity = std::numeric_limits<double>::infinity();
  const Settings settings = {
      lr, beta1, beta2, eps, low.value_or(-infinity), high.value_or(infinity), Powers(beta1), Powers(beta2)};
  const int64_t n = index.numel(), columns = table.dim() > 1 ? table.size(1) : 1;
  const auto* rows = static_cast<const char*>(index.data_ptr());
  const int64_t stride = index.stride(0) * static_cast<int64_t>(sizeof(int64_t));
  check_rows(rows, stride, n, table.size(0));
  if (n == 0 || columns == 0) return;
  const Rows all = {Matrix(table), Matrix(exp_avg), Matrix(exp_avg_sq), Matrix(steps)};
  const Unique unique(rows, stride, n, all);
  const Task task = {all, Matrix(grad), columns, unique, settings};
  const bool wide = exp_avg.scalar_type() == ScalarType::Float;
  switch (table.scalar_type()) {
    case ScalarType::Float:
      return run_step<float, float>(task);
    case ScalarType::Double:
      return run_step<double, double>(task);
    case ScalarType::BFloat16:
      return wide ? run_step<Bfloat16, float>(task) : run_step<Bfloat16, Bfloat16>(task);
    default:
      return wide ? run_step<Float16, float>(task) : run_step<Float16, Float16>(task);
  }
}

}  // namespace
}  // namespace fastmeta

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) { m.impl("masked_adam_", TORCH_BOX(&fastmeta::masked_adam_)); }
