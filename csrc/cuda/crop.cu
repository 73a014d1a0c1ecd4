// crop: a thread a pixel of the result.
#include "crop.h"

#include "cuda/launch.h"

namespace fastmeta {
namespace {

constexpr int block_threads = 256;

__global__ void __launch_bounds__(block_threads) crop_images(FASTMETA_STRUCTURE(Crop) crop) {
  const int64_t i = blockIdx.x * int64_t{block_threads} + threadIdx.x, size = crop.size;
  if (i >= crop.count * crop.channels * size * size) return;
  const int64_t x = i % size, y = i / size % size, plane = i / (size * size), image = plane / crop.channels;
  const uint8_t* source = crop.images + plane * crop.height * crop.width;
  const int left = inside(crop.columns[image * size + x], crop.width), right = inside(left + 1, crop.width);
  const int top = inside(crop.rows[image * size + y], crop.height), bottom = inside(top + 1, crop.height);
  const float share = crop.column_shares[image * size + x];
  const uint8_t *first = source + static_cast<int64_t>(top) * crop.width,
                *second = source + static_cast<int64_t>(bottom) * crop.width;
  const float above = lerp(first[left], first[right], share), below = lerp(second[left], second[right], share);
  const float mixed = lerp(above, below, crop.row_shares[image * size + y]);
  if (crop.unit) {
    static_cast<float*>(crop.out)[i] = over_255(mixed);
  } else {
    static_cast<uint8_t*>(crop.out)[i] = to_byte(over_255(mixed));
  }
}

Tensor crop_tensors(const Tensor& images, const Tensor& columns, const Tensor& column_shares, const Tensor& rows,
                    const Tensor& row_shares, bool unit) {
  const CropCall call(images, columns, column_shares, rows, row_shares, unit);
  const Crop& crop = call.arguments;
  const int64_t pixels = crop.count * crop.channels * crop.size * crop.size;
  const Launcher launch("crop", images);
  launch(crop_images,
         {.blocks = dim3(static_cast<unsigned>((pixels + block_threads - 1) / block_threads)),
          .threads = dim3(block_threads)},
         crop);
  return call.out;
}

}  // namespace
}  // namespace fastmeta

STABLE_TORCH_LIBRARY_IMPL(FASTMETA_NAMESPACE, FASTMETA_DEVICE_KEY, m) {
  m.impl("crop", TORCH_BOX(&fastmeta::crop_tensors));
}
