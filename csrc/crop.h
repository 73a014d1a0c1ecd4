// crop: each pixel of the result lies between a column of the source and the next, and so for rows.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "augment.h"
#include "checks.h"

namespace fastmeta {

// A call. Everything is contiguous.
struct Crop {
  const uint8_t* images;       // [N, C, H, W]
  const int32_t* columns;      // [N, S]
  const float* column_shares;  // [N, S], of the next column
  const int32_t* rows;         // [N, S]
  const float* row_shares;     // [N, S]
  void* out;                   // [N, C, S, S], float32 in [0, 1] or the nearest of 255 steps of it
  int64_t count;
  int channels, height, width, size;
  bool unit;
};

FASTMETA_PIXEL_FUNCTION float lerp(float first, float second, float share) {
  return first + product(share, second - first);
}

// A place beyond the image is the nearest one.
FASTMETA_PIXEL_FUNCTION int inside(int place, int side) { return place < 0 ? 0 : place >= side ? side - 1 : place; }

// To the nearest of 255 steps, of two as near to the even one: beyond 2^23 a float32 has no fraction.
FASTMETA_PIXEL_FUNCTION uint8_t to_byte(float unit) {
  constexpr float whole = 1 << 23;
  return static_cast<uint8_t>(static_cast<int>((product(unit, 255.0f) + whole) - whole));
}

struct CropCall {
  Crop arguments{};
  Tensor out;

  CropCall(const Tensor& images, const Tensor& columns, const Tensor& column_shares, const Tensor& rows,
           const Tensor& row_shares, bool unit) {
    check_plain(images, "images", ScalarType::Byte, images, "images");
    STD_TORCH_CHECK(images.dim() == 4 && images.size(2) >= 1 && images.size(3) >= 1,
                    "images must be [N, C, H, W], got ", shape_of(images));
    check_plain(columns, "columns", ScalarType::Int, images, "images");
    check_plain(rows, "rows", ScalarType::Int, images, "images");
    check_plain(column_shares, "column_shares", ScalarType::Float, images, "images");
    check_plain(row_shares, "row_shares", ScalarType::Float, images, "images");
    const int64_t count = images.size(0), size = columns.dim() == 2 ? columns.size(1) : 0;
    for (const Tensor* each : {&columns, &column_shares, &rows, &row_shares}) {
      STD_TORCH_CHECK(each->dim() == 2 && each->size(0) == count && each->size(1) == size,
                      "columns, rows and shares must be [N, S] with N = ", count, ", got ", shape_of(*each));
    }
    out = torch::stable::new_empty(images, {count, images.size(1), size, size},
                                   unit ? ScalarType::Float : ScalarType::Byte);
    arguments = {.images = static_cast<const uint8_t*>(images.const_data_ptr()),
                 .columns = static_cast<const int32_t*>(columns.const_data_ptr()),
                 .column_shares = static_cast<const float*>(column_shares.const_data_ptr()),
                 .rows = static_cast<const int32_t*>(rows.const_data_ptr()),
                 .row_shares = static_cast<const float*>(row_shares.const_data_ptr()),
                 .out = out.mutable_data_ptr(),
                 .count = count,
                 .channels = static_cast<int>(images.size(1)),
                 .height = static_cast<int>(images.size(2)),
                 .width = static_cast<int>(images.size(3)),
                 .size = static_cast<int>(size),
                 .unit = unit};
  }
};

}  // namespace fastmeta
