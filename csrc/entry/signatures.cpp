#include "signatures.h"

#include <cmath>
#include <cstring>

#include "../loss.h"

namespace fastmeta {

namespace {

using Tensors = const DLTensor* const*;
using Kind = NumberRule::Kind;

constexpr double huge = 1.7976931348623157e308;
constexpr NumberRule loss{Kind::code, 0.0, num_losses - 1.0};
constexpr NumberRule any{Kind::number, -huge, huge};
constexpr NumberRule flag{Kind::flag, 0.0, 1.0};
constexpr NumberRule not_negative{Kind::number, 0.0, huge};
constexpr NumberRule damping{Kind::or_zero, 0.0, huge};
constexpr NumberRule decay{Kind::number, 0.0, 0.99999999999999989};  // [0, 1)
constexpr NumberRule bound{Kind::optional, -huge, huge};

bool matrix(const DLTensor* tensor) { return tensor && tensor->ndim == 2; }

// C of logits [N, C] or of a head [C, D].
bool outputs_of(const DLTensor* logits, const DLTensor* head, int64_t* outputs) {
  if ((logits == nullptr) == (head == nullptr) || !matrix(logits ? logits : head)) return false;
  *outputs = logits ? logits->shape[1] : head->shape[0];
  return true;
}

bool per_example(Tensors t, Shape* out) {  // [N]
  if (!matrix(t[0])) return false;
  out[0] = {1, {t[0]->shape[0], 0}};
  return true;
}

bool labels(Tensors t, Shape* out) {  // [N, C]
  int64_t outputs;
  if (!matrix(t[0]) || !outputs_of(t[1], t[2], &outputs)) return false;
  out[0] = {2, {t[0]->shape[0], outputs}};
  return true;
}

bool layer(Tensors t, Shape* out) {  // [C, D], [C]
  int64_t outputs;
  if (!matrix(t[0]) || !outputs_of(t[1], t[2], &outputs)) return false;
  out[0] = {2, {outputs, t[0]->shape[1]}};
  out[1] = {1, {outputs, 0}};
  return true;
}

bool hessian(Tensors t, Shape* out) {  // [C, D], [C] or [0]
  if (!matrix(t[0]) || !matrix(t[3])) return false;
  out[0] = {2, {t[3]->shape[0], t[3]->shape[1]}};
  out[1] = {1, {t[4] ? t[3]->shape[0] : 0, 0}};
  return true;
}

bool similarity(Tensors t, Shape* out) {  // [Nu, C]
  if (!matrix(t[0]) || !matrix(t[2])) return false;
  out[0] = {2, {t[0]->shape[0], t[2]->shape[1]}};
  return true;
}

bool like_first(Tensors t, Shape* out) {  // [N, C]
  if (!matrix(t[0])) return false;
  out[0] = {2, {t[0]->shape[0], t[0]->shape[1]}};
  return true;
}

bool nothing(Tensors, Shape*) { return true; }

constexpr int none = -1;
#define NOT_IN_PLACE {none, none, none, none}
constexpr Signature signatures[] = {
    // features logits head_weight head_bias targets direction_weight direction_bias | loss
    {"per_example_dot", 7, 1, 1, {loss}, per_example, NOT_IN_PLACE, none},
    // features logits head_weight head_bias targets direction_weight direction_bias | loss scale
    {"label_gradient", 7, 2, 1, {loss, any}, labels, NOT_IN_PLACE, none},
    // features logits head_weight head_bias targets weights | loss
    {"last_layer_gradient", 6, 1, 2, {loss}, layer, NOT_IN_PLACE, none},
    // features logits targets direction_weight direction_bias weights | loss damping
    {"hessian_vector_product", 6, 2, 2, {loss, damping}, hessian, NOT_IN_PLACE, 4},
    // features_u features_h residual_h | scale bias
    {"feature_similarity", 3, 2, 1, {any, flag}, similarity, NOT_IN_PLACE, none},
    // logits_plus logits_minus labels epsilon | step project
    {"finite_difference_labels", 4, 2, 1, {any, flag}, like_first, NOT_IN_PLACE, none},
    // table index grad exp_avg exp_avg_sq steps | lr beta1 beta2 eps low high
    {"masked_adam_", 6, 6, 0, {any, decay, decay, not_negative, bound, bound}, nothing, {0, 3, 4, 5}, none},
};
#undef NOT_IN_PLACE

}  // namespace

const Signature* find_signature(const char* name) {
  for (const Signature& signature : signatures) {
    if (std::strcmp(signature.name, name) == 0) return &signature;
  }
  return nullptr;
}

}  // namespace fastmeta
