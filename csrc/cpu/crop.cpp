// crop: a row of the source is drawn out to the width of the result once, then pairs of rows are mixed.
#include "crop.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <type_traits>

#include "cpu/buffer.h"

namespace fastmeta {
namespace {

// The last two rows drawn out, as the rows of a crop mostly ask for one of them again.
class DrawnRows {
 public:
  DrawnRows(const Crop& crop, int64_t image)
      : crop_(crop),
        columns_(crop.columns + image * crop.size),
        shares_(crop.column_shares + image * crop.size),
        memory_(2 * crop.size) {}

  void start(const uint8_t* plane) {
    plane_ = plane;
    held_[0] = held_[1] = -1;
  }

  const float* at(int row) {
    const int slot = row % 2;
    float* __restrict out = memory_.data() + slot * crop_.size;
    if (held_[slot] == row) return out;
    held_[slot] = row;
    const uint8_t* from = plane_ + static_cast<int64_t>(row) * crop_.width;
    for (int x = 0, size = crop_.size, width = crop_.width; x < size; ++x) {
      const int left = inside(columns_[x], width);
      out[x] = lerp(from[left], from[inside(left + 1, width)], shares_[x]);
    }
    return out;
  }

 private:
  const Crop& crop_;
  const int32_t* columns_;
  const float* shares_;
  const Buffer<float> memory_;
  const uint8_t* plane_ = nullptr;
  int held_[2] = {-1, -1};
};

template <class T>
void crop_image(const Crop& crop, int64_t image) {
  DrawnRows drawn(crop, image);
  const int32_t* rows = crop.rows + image * crop.size;
  const float* shares = crop.row_shares + image * crop.size;
  const int64_t plane = static_cast<int64_t>(crop.height) * crop.width;
  T* __restrict out = static_cast<T*>(crop.out) + image * crop.channels * crop.size * crop.size;
  for (int c = 0; c < crop.channels; ++c) {
    drawn.start(crop.images + (image * crop.channels + c) * plane);
    for (int y = 0; y < crop.size; ++y, out += crop.size) {
      const int top = inside(rows[y], crop.height);
      const float *above = drawn.at(top), *below = drawn.at(inside(top + 1, crop.height)), share = shares[y];
      for (int x = 0, size = crop.size; x < size; ++x) {
        const float value = over_255(lerp(above[x], below[x], share));
        if constexpr (std::is_same_v<T, float>) {
          out[x] = value;
        } else {
          out[x] = to_byte(value);
        }
      }
    }
  }
}

Tensor crop_tensors(const Tensor& images, const Tensor& columns, const Tensor& column_shares, const Tensor& rows,
                    const Tensor& row_shares, bool unit) {
  const CropCall call(images, columns, column_shares, rows, row_shares, unit);
  const Crop& crop = call.arguments;
  torch::stable::parallel_for(0, crop.count, 1, [&](int64_t first, int64_t last) {
    for (int64_t image = first; image < last; ++image) {
      crop.unit ? crop_image<float>(crop, image) : crop_image<uint8_t>(crop, image);
    }
  });
  return call.out;
}

}  // namespace
}  // namespace fastmeta

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) { m.impl("crop", TORCH_BOX(&fastmeta::crop_tensors)); }
