// The arguments of augment, checked, for the CPU and for CUDA.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>

#include "augment.h"
#include "checks.h"

namespace fastmeta {

// The call and its result's memory. The tensors must outlive it.
struct AugmentCall {
  Augment arguments{};
  Tensor out;

  AugmentCall(const Tensor& images, const std::optional<Tensor>& moves, const Tensor& operations, const Tensor& levels,
              const std::optional<Tensor>& places, const std::array<int64_t, 4>& colors, bool reflected, bool unit) {
    check_plain(images, "images", ScalarType::Byte, images, "images");
    STD_TORCH_CHECK(images.dim() == 4 && (images.size(1) == 1 || images.size(1) == 3),
                    "images must be [N, 1 or 3, H, W], got ", shape_of(images));
    for (const int64_t d : {2, 3}) {
      STD_TORCH_CHECK(images.size(d) >= 1 && images.size(d) <= largest_side, "images must have 1 to ", largest_side,
                      " pixels a side, got ", shape_of(images));
    }
    check_plain(operations, "operations", ScalarType::Long, images, "images");
    STD_TORCH_CHECK(operations.dim() == 2 && operations.size(0) == images.size(0),
                    "operations must be [N, D] with N = ", images.size(0), ", got ", shape_of(operations));
    const int64_t count = images.size(0), steps = operations.size(1);
    check_plain(levels, "levels", ScalarType::Float, images, "images");
    STD_TORCH_CHECK(levels.dim() == 2 && levels.size(0) == count && levels.size(1) == steps,
                    "levels must be like operations, got ", shape_of(levels));
    if (places) {
      check_plain(*places, "places", ScalarType::Float, images, "images");
      STD_TORCH_CHECK(
          places->dim() == 3 && places->size(0) == count && places->size(1) == steps && places->size(2) == 2,
          "places must be [N, D, 2], got ", shape_of(*places));
    }
    if (moves) {
      check_plain(*moves, "moves", ScalarType::Int, images, "images");
      STD_TORCH_CHECK(moves->dim() == 2 && moves->size(0) == count && moves->size(1) == 3,
                      "moves must be [N, 3] with N = ", count, ", got ", shape_of(*moves));
    }
    for (const int64_t color : colors) {
      STD_TORCH_CHECK(color >= 0 && color <= 255, "a color must lie in 0 .. 255, got ", color);
    }
    const std::optional<ScalarType> type = unit ? ScalarType::Float : ScalarType::Byte;
    out = torch::stable::new_empty(images, images.sizes(), type);
    arguments = {.images = static_cast<const uint8_t*>(images.const_data_ptr()),
                 .moves = moves ? static_cast<const int32_t*>(moves->const_data_ptr()) : nullptr,
                 .operations = static_cast<const int64_t*>(operations.const_data_ptr()),
                 .levels = static_cast<const float*>(levels.const_data_ptr()),
                 .places = places ? static_cast<const float*>(places->const_data_ptr()) : nullptr,
                 .out = out.mutable_data_ptr(),
                 .count = count,
                 .channels = static_cast<int>(images.size(1)),
                 .height = static_cast<int>(images.size(2)),
                 .width = static_cast<int>(images.size(3)),
                 .steps = static_cast<int>(steps),
                 .fill = static_cast<int>(colors[0]),
                 .square = {static_cast<int>(colors[1]), static_cast<int>(colors[2]), static_cast<int>(colors[3])},
                 .reflected = reflected,
                 .unit = unit};
  }
};

}  // namespace fastmeta
