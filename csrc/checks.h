// Checks of arguments: one error that names the argument, what was expected and what came, before memory is touched.
// fastmeta/checks.py makes the same checks for the reference path.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>

#include "loss.h"
#include "view.h"

namespace fastmeta {

// A tensor is torch's own or a View, which answer the same questions.
template <class AnyTensor>
std::string shape_of(const AnyTensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

inline bool is_supported(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
         type == ScalarType::Double;
}

inline bool on_one_device(const Tensor& a, const Tensor& b) { return a.device() == b.device(); }
inline bool on_one_device(const View& a, const View& b) { return a.is_on_device_of(b); }

inline void check_present(const Tensor&, const char*) {}
inline void check_present(const View& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.has_value(), name, " must be a tensor, got None");
}

template <class AnyTensor>
void check_floating(const AnyTensor& tensor, const char* name) {
  check_present(tensor, name);
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(is_supported(type), name, " must be float32, bfloat16, float16 or float64, got ",
                  torch::headeronly::toString(type));
}

inline void check_matrix(const View& tensor, const char* name, const char* symbols) {
  check_floating(tensor, name);
  STD_TORCH_CHECK(tensor.dim() == 2, name, " must be 2-D ", symbols, ", got ", tensor.dim(), "-D ", shape_of(tensor));
}

// Same dtype and device as the first argument.
template <class AnyTensor>
void check_like(const AnyTensor& tensor, const char* name, const AnyTensor& first, const char* first_name) {
  STD_TORCH_CHECK(on_one_device(tensor, first), name, " must be on the device of ", first_name);
  STD_TORCH_CHECK(tensor.scalar_type() == first.scalar_type(), name, " must be ",
                  torch::headeronly::toString(first.scalar_type()), " like ", first_name, ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
}

// A type, contiguous memory and the device of the first argument.
inline void check_plain(const Tensor& tensor, const char* name, ScalarType type, const Tensor& first,
                        const char* first_name) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " must be ", torch::headeronly::toString(type), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(on_one_device(tensor, first), name, " must be on the device of ", first_name);
}

template <class AnyTensor>
void check_vector(const AnyTensor& tensor, const char* name, const char* symbols, int64_t size) {
  check_present(tensor, name);
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size, name, " must be ", symbols, " = [", size, "], got ",
                  shape_of(tensor));
}

template <class AnyTensor>
void check_shape(const AnyTensor& tensor, const char* name, const char* symbols, int64_t rows, int64_t columns) {
  check_present(tensor, name);
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, name, " must be ", symbols,
                  " = [", rows, ", ", columns, "], got ", shape_of(tensor));
}

inline void check_finite(double value, const char* name) {
  STD_TORCH_CHECK(std::isfinite(value), name, " must be finite, got ", value);
}

// The code comes as a number among the others of a call.
inline Loss check_loss(double loss) {
  STD_TORCH_CHECK(loss >= 0 && loss < num_losses && loss == std::floor(loss), "loss must be in [0, ", num_losses,
                  "), got ", loss);
  return static_cast<Loss>(static_cast<int>(loss));
}

struct LastLayerSizes {
  int64_t examples, features, outputs;  // N, D, C
};

// Features [N, D], and logits [N, C] or a head [C, D], [C].
inline LastLayerSizes check_outputs(const View& features, const View& logits, const View& head_weight,
                                    const View& head_bias) {
  check_matrix(features, "features", "[N, D]");
  STD_TORCH_CHECK(logits.has_value() != head_weight.has_value(), "either logits or a head must be given, got ",
                  logits.has_value() ? "both" : "none");
  LastLayerSizes sizes{features.size(0), features.size(1), 0};
  if (logits.has_value()) {
    check_matrix(logits, "logits", "[N, C]");
    sizes.outputs = logits.size(1);
    check_shape(logits, "logits", "[N, C]", sizes.examples, sizes.outputs);
    check_like(logits, "logits", features, "features");
  } else {
    check_matrix(head_weight, "head weight", "[C, D]");
    sizes.outputs = head_weight.size(0);
    check_shape(head_weight, "head weight", "[C, D]", sizes.outputs, sizes.features);
    check_like(head_weight, "head weight", features, "features");
    if (head_bias.has_value()) {
      check_vector(head_bias, "head bias", "[C]", sizes.outputs);
      check_like(head_bias, "head bias", features, "features");
    }
  }
  return sizes;
}

// Direction [C, D] and [C] or nothing.
inline void check_direction(const LastLayerSizes& sizes, const View& weight, const View& bias, const View& features) {
  check_shape(weight, "direction_weight", "[C, D]", sizes.outputs, sizes.features);
  check_like(weight, "direction_weight", features, "features");
  if (bias.has_value()) {
    check_vector(bias, "direction_bias", "[C]", sizes.outputs);
    check_like(bias, "direction_bias", features, "features");
  }
}

// Example weights [N] or nothing.
inline void check_weights(const LastLayerSizes& sizes, const View& weights, const View& features) {
  if (!weights.has_value()) return;
  check_vector(weights, "weights", "[N]", sizes.examples);
  check_like(weights, "weights", features, "features");
}

// Probabilities [N, C], or int64 classes [N]; their range is checked where they are read (check_classes).
inline void check_targets(const LastLayerSizes& sizes, const View& targets, const View& features) {
  check_present(targets, "targets");
  if (targets.scalar_type() == ScalarType::Long) {
    STD_TORCH_CHECK(targets.is_on_device_of(features), "targets must be on the device of features");
    check_vector(targets, "targets of int64 classes", "[N]", sizes.examples);
  } else {
    check_floating(targets, "targets");
    check_shape(targets, "targets", "[N, C]", sizes.examples, sizes.outputs);
    check_like(targets, "targets", features, "features");
  }
}

// Every class in [0, C), before any is used as an index.
inline void check_classes(const int64_t* classes /* [N] */, int64_t count, int64_t outputs) {
  bool inside = true;
  for (int64_t i = 0; i < count; ++i) inside &= static_cast<uint64_t>(classes[i]) < static_cast<uint64_t>(outputs);
  if (inside) return;
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(classes[i] >= 0 && classes[i] < outputs, "targets must be classes in [0, ", outputs, "), got ",
                    classes[i]);
  }
}

}  // namespace fastmeta
