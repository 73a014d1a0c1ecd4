// perturbed: the norm of a direction, theta = saved +- epsilon v in one pass, and the way back.
#ifndef FASTMETA_TARGET

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/stream.h"
#include "cpu/tensor_list.h"
#include "element_types.h"

#define FASTMETA_KERNELS "cpu/perturbed.cpp"
#include "cpu/targets.h"

namespace fastmeta {
namespace {

// Each group of K tensors, the first of which is the parameter, with its copy in the backup as the last operand.
template <int K>
std::vector<Group<K + 1>> with_backup(const ListTensor* tensors, size_t count, char* backup) {
  std::vector<Group<K + 1>> joined;
  joined.reserve(count);
  char* copy = backup + backup_align;
  for (size_t i = 0; i < count; ++i) {
    joined.push_back(with_copy(make_group<K>(tensors + K * i), tensors[K * i], copy));
    copy += bytes_of_copy(tensors[K * i]);
  }
  return joined;
}

void write_epsilon(double epsilon, const ListTensor& out) {
  // A finite factor: infinity times an entry that does not move would be NaN.
  if (out.type == ScalarType::Double) {
    constexpr double most = std::numeric_limits<double>::max();
    *reinterpret_cast<double*>(out.data) = epsilon > most ? most : epsilon;
  } else {
    constexpr double most = std::numeric_limits<float>::max();
    *reinterpret_cast<float*>(out.data) = static_cast<float>(epsilon > most ? most : epsilon);
  }
}

double read_epsilon(const ListTensor& epsilon) {
  return epsilon.type == ScalarType::Double ? *reinterpret_cast<const double*>(epsilon.data)
                                            : *reinterpret_cast<const float*>(epsilon.data);
}

// radius / ||v|| of operand V, or radius where the norm is 0.
template <int V, int K>
double size_epsilon(const Units<K>& units, double radius) {
  std::vector<double> sums(units.count, 0.0);  // one for each unit: the same on any number of threads
  for_each_block<K>(
      units, {1 << V, 0},
      [&](size_t g, char* const(&run)[K], int64_t, int64_t count, int64_t unit) {
        double* sum = &sums[unit];
        with_element(units.groups[g].type[V], [&](auto zero) {
          using T = decltype(zero);
          FASTMETA_BEST(sum_of_squares<T>)(reinterpret_cast<const T*>(run[V]), count, sum);
        });
      },
      [] {});
  double square = 0;
  for (const double sum : sums) square += sum;
  return radius / (square == 0 ? 1.0 : std::sqrt(square));
}

// Of theta, v, saved.
void move_all(const Units<3>& units, double factor, bool save, bool stream) {
  for_each_block<3>(
      units, save ? Access{0b011, 0b101} : Access{0b110, 0b001},
      [&](size_t g, char* const(&run)[3], int64_t, int64_t count, int64_t) {
        with_element(units.groups[g].type[0], [&](auto zero) {
          using T = decltype(zero);
          const auto kernel = save ? FASTMETA_BEST(save_and_move<T>) : FASTMETA_BEST(move<T>);
          kernel(reinterpret_cast<T*>(run[0]), reinterpret_cast<const T*>(run[1]), reinterpret_cast<T*>(run[2]),
                 static_cast<typename Wide<T>::type>(factor), count, stream);
        });
      },
      [stream] { store_fence(stream); });
}

// theta <- saved, the first and the last operand.
template <int K>
void restore_all(const Units<K>& units, bool stream) {
  for_each_block<K>(
      units, {1 << (K - 1), 1},
      [&](size_t g, char* const(&run)[K], int64_t, int64_t count, int64_t) {
        store(run[0], run[K - 1], count * units.groups[g].element_size[0], stream);
      },
      [stream] { store_fence(stream); });
}

class CpuPerturbation final : public Perturbation {
 public:
  CpuPerturbation(const ListTensor* tensors, size_t count, const ListTensor& backup, const ListTensor& epsilon)
      : holds_(*backup.data),
        stream_(exceeds_cache(3 * backup.numel)),
        epsilon_(epsilon),
        groups_(with_backup<2>(tensors, count, backup.data)),
        units_(groups_) {}

  void enter(double radius) override {
    check_radius(radius);
    STD_TORCH_CHECK(!holds_, "backup holds parameters already");
    write_epsilon(size_epsilon<1>(units_, radius), epsilon_);
    factor_ = read_epsilon(epsilon_);
    move_all(units_, factor_, true, stream_);
    holds_ = 1;
  }
  void move(double sign) override {
    STD_TORCH_CHECK(holds_, "backup is empty");
    move_all(units_, sign * factor_, false, stream_);
  }
  void restore() override {
    if (holds_) restore_all(units_, stream_);
    holds_ = 0;
  }
  void leave_out(const char* const* begin, const char* const* end) override {
    for (auto& group : groups_) {
      if (std::binary_search(begin, end, group.data[0])) group.numel = 0;
    }
  }

 private:
  char& holds_;
  bool stream_;
  ListTensor epsilon_;
  double factor_ = 0;
  std::vector<Group<3>> groups_;
  Units<3> units_;
};

}  // namespace

Perturbation* perturb(const ListTensor* tensors, size_t count, const ListTensor& backup, const ListTensor& epsilon) {
  check_perturb(tensors, count, epsilon);
  check_backup(backup, tensors, count, 2);
  return new CpuPerturbation(tensors, count, backup, epsilon);
}

const ListFunctions* fastmeta_list_functions() {
  static constexpr ListFunctions functions = {&check_alignment, &align, &perturb};
  return &functions;
}

namespace {

Tensor perturb_epsilon(const std::vector<Tensor>& direction, double radius) {
  check_radius(radius);
  std::vector<Group<1>> groups;
  bool has_double = false;
  for (size_t i = 0; i < direction.size(); ++i) {
    const ListTensor v = list_tensor(direction[i]);
    check_supported(v, "direction", i);
    has_double = has_double || v.type == ScalarType::Double;
    groups.push_back(make_group<1>(&v));
  }
  Tensor epsilon = torch::stable::empty({}, has_double ? ScalarType::Double : ScalarType::Float);
  write_epsilon(size_epsilon<0>(Units<1>(groups), radius), list_tensor(epsilon));
  return epsilon;
}

void perturb_(const std::vector<Tensor>& params, const std::vector<Tensor>& direction, Tensor backup,
              const Tensor& epsilon, double sign, bool save) {
  const auto tensors = list_tensors<2>({&params, &direction}, {"params", "direction"});
  check_finite(sign, "sign");
  check_perturb(tensors.data(), params.size(), list_tensor(epsilon));
  STD_TORCH_CHECK(epsilon.is_cpu(), "epsilon must be on the CPU");
  check_backup(list_tensor(backup), tensors.data(), params.size(), 2);
  char* const saved = list_tensor(backup).data;
  STD_TORCH_CHECK(save != static_cast<bool>(saved[0]), save ? "backup holds parameters already" : "backup is empty");
  const auto groups = with_backup<2>(tensors.data(), params.size(), saved);
  move_all(Units<3>(groups), sign * read_epsilon(list_tensor(epsilon)), save, exceeds_cache(3 * backup.numel()));
  saved[0] = 1;
}

void perturb_restore_(const std::vector<Tensor>& params, Tensor backup) {
  const auto tensors = list_tensors<1>({&params}, {"params"});
  for (size_t i = 0; i < params.size(); ++i) check_supported(tensors[i], "params", i);
  check_backup(list_tensor(backup), tensors.data(), params.size(), 1);
  char* const saved = list_tensor(backup).data;
  if (!saved[0]) return;
  const auto groups = with_backup<1>(tensors.data(), params.size(), saved);
  restore_all(Units<2>(groups), exceeds_cache(3 * backup.numel()));
  saved[0] = 0;
}

}  // namespace
}  // namespace fastmeta

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) {
  m.impl("perturb_epsilon", TORCH_BOX(&fastmeta::perturb_epsilon));
  m.impl("perturb_", TORCH_BOX(&fastmeta::perturb_));
  m.impl("perturb_restore_", TORCH_BOX(&fastmeta::perturb_restore_));
}

#else

#include "cpu/convert.h"

namespace fastmeta::FASTMETA_TARGET {

template <class T>
void sum_of_squares(const T* __restrict v, int64_t count, double* __restrict sum) {
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

// saved <- theta, theta <- theta + factor v.
template <class T>
void save_and_move(T* __restrict theta, const T* __restrict v, T* __restrict saved, typename Wide<T>::type factor,
                   int64_t count, bool stream) {
  store(saved, theta, count * static_cast<int64_t>(sizeof(T)), stream);
  for (int64_t i = 0; i < count; ++i) theta[i] = round_to<T>(widen(theta[i]) + factor * widen(v[i]));
}

// theta <- saved + factor v.
template <class T>
void move(T* __restrict theta, const T* __restrict v, T* __restrict saved, typename Wide<T>::type factor, int64_t count,
          bool stream) {
  alignas(backup_align) T moved[block_elements];
  for (int64_t i = 0; i < count; ++i) moved[i] = round_to<T>(widen(saved[i]) + factor * widen(v[i]));
  store(theta, moved, count * static_cast<int64_t>(sizeof(T)), stream);
}

}  // namespace fastmeta::FASTMETA_TARGET

#endif
