// perturbed: the norm of a direction, theta = saved +- epsilon v in one pass, and the way back.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>

#include "cpu/convert.h"
#include "cpu/stream.h"
#include "cpu/tensor_list.h"

namespace fastmeta {
namespace {

template <class T>
struct SumOfSquares {
  static FASTMETA_INLINE void run(const T* __restrict v, int64_t count, double* __restrict sum) {
    constexpr int lanes = 32;
    double partial[lanes] = {};
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) {
      for (int j = 0; j < lanes; ++j) {
        const double x = widen(v[i + j]);
        partial[j] += x * x;
      }
    }
    for (int j = 0; i + j < count; ++j) {
      const double x = widen(v[i + j]);
      partial[j] += x * x;
    }
    double total = 0;
    for (int j = 0; j < lanes; ++j) total += partial[j];
    *sum += total;
  }
};

// saved <- theta, theta <- theta + factor v.
template <class T>
struct SaveAndMove {
  using W = typename Wide<T>::type;
  static FASTMETA_INLINE void run(T* __restrict theta, const T* __restrict v, T* __restrict saved, W factor,
                                  int64_t count, bool stream) {
    store(saved, theta, count * static_cast<int64_t>(sizeof(T)), stream);
    for (int64_t i = 0; i < count; ++i) theta[i] = narrow<T>(widen(theta[i]) + factor * widen(v[i]));
  }
};

// theta <- saved + factor v.
template <class T>
struct Move {
  using W = typename Wide<T>::type;
  static FASTMETA_INLINE void run(T* __restrict theta, const T* __restrict v, T* __restrict saved, W factor,
                                  int64_t count, bool stream) {
    alignas(backup_align) T moved[kTile];
    for (int64_t i = 0; i < count; ++i) moved[i] = narrow<T>(widen(saved[i]) + factor * widen(v[i]));
    store(theta, moved, count * static_cast<int64_t>(sizeof(T)), stream);
  }
};

struct Copy {
  static FASTMETA_INLINE void run(char* to, const char* from, int64_t bytes, bool stream) {
    store(to, from, bytes, stream);
  }
};

// Each group with its copy in the backup as the last operand.
template <int K>
std::vector<Group<K + 1>> with_backup(const std::vector<Group<K>>& groups, const std::vector<Tensor>& params,
                                      char* backup) {
  std::vector<Group<K + 1>> joined;
  joined.reserve(groups.size());
  char* copy = backup + backup_align;
  for (size_t i = 0; i < groups.size(); ++i) {
    joined.push_back(with_copy(groups[i], params[i], copy));
    copy += bytes_of_copy(params[i]);
  }
  return joined;
}

Tensor perturb_epsilon(const std::vector<Tensor>& direction, double radius) {
  check_finite(radius, "radius");
  STD_TORCH_CHECK(radius >= 0, "radius must be >= 0, got ", radius);
  std::vector<Group<1>> groups;
  bool has_double = false;
  for (size_t i = 0; i < direction.size(); ++i) {
    check_floating(direction[i], "direction");
    has_double = has_double || direction[i].scalar_type() == ScalarType::Double;
    groups.push_back(make_group<1>({&direction[i]}));
  }
  const Units<1> units(groups);
  std::vector<double> sums(units.count, 0.0);  // one for each unit: the same on any number of threads
  for_each_tile<1>(
      units, {1, 0},
      [&](size_t g, char* const(&run)[1], int64_t first, int64_t count, int64_t unit) {
        double* sum = &sums[unit];
        switch (groups[g].type[0]) {
          case ScalarType::Float:
            return run_best<SumOfSquares<float>>(reinterpret_cast<const float*>(run[0]), count, sum);
          case ScalarType::Double:
            return run_best<SumOfSquares<double>>(reinterpret_cast<const double*>(run[0]), count, sum);
          case ScalarType::BFloat16:
            return run_best<SumOfSquares<Bfloat16>>(reinterpret_cast<const Bfloat16*>(run[0]), count, sum);
          default:
            return run_best<SumOfSquares<Float16>>(reinterpret_cast<const Float16*>(run[0]), count, sum);
        }
      },
      [] {});
  double square = 0;
  for (const double sum : sums) square += sum;
  const double epsilon = radius / (square == 0 ? 1.0 : std::sqrt(square));
  Tensor out = torch::stable::empty({}, has_double ? ScalarType::Double : ScalarType::Float);
  // A finite factor: infinity times an entry that does not move would be NaN.
  if (has_double) {
    constexpr double most = std::numeric_limits<double>::max();
    *static_cast<double*>(out.data_ptr()) = epsilon > most ? most : epsilon;
  } else {
    constexpr double most = std::numeric_limits<float>::max();
    *static_cast<float*>(out.data_ptr()) = static_cast<float>(epsilon > most ? most : epsilon);
  }
  return out;
}

template <class T>
void perturb_tile(char* const (&run)[3], double factor, int64_t count, bool save, bool stream) {
  auto* theta = reinterpret_cast<T*>(run[0]);
  const auto* v = reinterpret_cast<const T*>(run[1]);
  auto* saved = reinterpret_cast<T*>(run[2]);
  const auto wide = static_cast<typename Wide<T>::type>(factor);
  if (save) return run_best<SaveAndMove<T>>(theta, v, saved, wide, count, stream);
  run_best<Move<T>>(theta, v, saved, wide, count, stream);
}

void perturb_(const std::vector<Tensor>& params, const std::vector<Tensor>& direction, Tensor backup,
              const Tensor& epsilon, double sign, bool save) {
  check_perturb(params, direction, epsilon, sign);
  STD_TORCH_CHECK(epsilon.is_cpu(), "epsilon must be on the CPU");
  std::vector<Group<2>> groups;
  groups.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) groups.push_back(make_group<2>({&params[i], &direction[i]}));
  char* saved = check_backup(backup, params);
  STD_TORCH_CHECK(save != static_cast<bool>(saved[0]), save ? "backup holds parameters already" : "backup is empty");
  const double factor =
      sign * (epsilon.scalar_type() == ScalarType::Double ? *static_cast<const double*>(epsilon.data_ptr())
                                                          : *static_cast<const float*>(epsilon.data_ptr()));
  const auto joined = with_backup(groups, params, saved);
  const bool stream = exceeds_cache(3 * backup.numel());
  for_each_tile<3>(
      Units<3>(joined), save ? Access{0b011, 0b101} : Access{0b110, 0b001},
      [&](size_t g, char* const(&run)[3], int64_t, int64_t count, int64_t) {
        switch (joined[g].type[0]) {
          case ScalarType::Float:
            return perturb_tile<float>(run, factor, count, save, stream);
          case ScalarType::Double:
            return perturb_tile<double>(run, factor, count, save, stream);
          case ScalarType::BFloat16:
            return perturb_tile<Bfloat16>(run, factor, count, save, stream);
          default:
            return perturb_tile<Float16>(run, factor, count, save, stream);
        }
      },
      [stream] { store_fence(stream); });
  saved[0] = 1;
}

void perturb_restore_(const std::vector<Tensor>& params, Tensor backup) {
  std::vector<Group<1>> groups;
  groups.reserve(params.size());
  for (const Tensor& theta : params) {
    check_floating(theta, "params");
    groups.push_back(make_group<1>({&theta}));
  }
  char* saved = check_backup(backup, params);
  if (!saved[0]) return;
  const auto joined = with_backup(groups, params, saved);
  const bool stream = exceeds_cache(3 * backup.numel());
  for_each_tile<2>(
      Units<2>(joined), {0b10, 0b01},
      [&](size_t g, char* const(&run)[2], int64_t, int64_t count, int64_t) {
        run_best<Copy>(run[0], run[1], count * joined[g].element_size[0], stream);
      },
      [stream] { store_fence(stream); });
  saved[0] = 0;
}

}  // namespace
}  // namespace fastmeta

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) {
  m.impl("perturb_epsilon", TORCH_BOX(&fastmeta::perturb_epsilon));
  m.impl("perturb_", TORCH_BOX(&fastmeta::perturb_));
  m.impl("perturb_restore_", TORCH_BOX(&fastmeta::perturb_restore_));
}
