// augment: a block for each image, which goes from one buffer to the other, an operation after another; see augment.h.
#include "augment.h"

#include "augment_call.h"
#include "cuda/launch.h"

namespace fastmeta {
namespace {

constexpr int block_threads = 256;

// What a block shares.
struct Shared {
  unsigned counts[3][256];  // of a channel's values
  uint8_t tables[3][256];
  unsigned long long sum;
  Taps taps[block_threads];
};

// The image that a block works on.
struct BlockImage {
  const Augment& call;
  const uint8_t* now;
  uint8_t *spare, *other;

  // Calls f(i, x, y, c) for every pixel, then waits.
  template <class F>
  __device__ void for_pixels(const F& f) const {
    const int64_t size = call.size(), plane = call.plane();
    for (int64_t i = threadIdx.x; i < size; i += block_threads) {
      const int64_t place = i % plane;
      f(i, static_cast<int>(place % call.width), static_cast<int>(place / call.width), static_cast<int>(i / plane));
    }
    __syncthreads();
  }

  // The same, where f(...) is the pixel's new value.
  template <class F>
  __device__ void become(const F& f) {
    for_pixels([&](int64_t i, int x, int y, int c) { spare[i] = f(i, x, y, c); });
    turn_over();
  }

  __device__ void turn_over() {
    uint8_t* const written = spare;
    spare = other;
    now = other = written;
  }
};

__device__ void move(BlockImage& image, const int32_t* move) {
  const Augment& call = image.call;
  image.become([&](int64_t, int x, int y, int c) -> uint8_t {
    const int row = moved_place(y + move[0], call.height, call.reflected);
    const int from = move[1] + (move[2] != 0 ? call.width - 1 - x : x);
    const int column = moved_place(from, call.width, call.reflected);
    return row < 0 || column < 0 ? 0 : image.now[c * call.plane() + static_cast<int64_t>(row) * call.width + column];
  });
}

__device__ int luma_at(const BlockImage& image, int64_t i) {
  const int64_t plane = image.call.plane();
  return luma(image.now[i], image.now[plane + i], image.now[2 * plane + i]);
}

__device__ void put_table(BlockImage& image, const Step& step, Shared& shared) {
  const Augment& call = image.call;
  const auto share = static_cast<float>(step.level);
  const bool counted = step.operation == Operation::autocontrast || step.operation == Operation::equalize;
  for (int i = threadIdx.x; i < 3 * 256; i += block_threads) shared.counts[i / 256][i % 256] = 0;
  if (threadIdx.x == 0) shared.sum = 0;
  __syncthreads();
  if (counted) {
    image.for_pixels([&](int64_t i, int, int, int c) { atomicAdd(&shared.counts[c][image.now[i]], 1u); });
  }
  if (step.operation == Operation::contrast) {
    unsigned long long mine = 0;
    for (int64_t i = threadIdx.x; i < call.plane(); i += block_threads) {
      mine += call.channels == 3 ? luma_at(image, i) : image.now[i];
    }
    atomicAdd(&shared.sum, mine);
    __syncthreads();
  }
  if (counted) {
    if (static_cast<int>(threadIdx.x) < call.channels) {  // a thread a channel
      const unsigned* counts = shared.counts[threadIdx.x];
      int low = 255, high = 0;
      for (int value = 0; value < 256; ++value) {
        if (counts[value] == 0) continue;
        low = value < low ? value : low;
        high = value;
      }
      const Stretch stretch(low, high);
      const Even even(static_cast<int>(counts[high]), static_cast<int>(call.plane()));
      for (int value = 0, below = 0; value < 256; ++value) {
        const int changed = step.operation == Operation::equalize ? even(value, below) : stretch(value);
        shared.tables[threadIdx.x][value] = blend(value, changed, share);
        below += static_cast<int>(counts[value]);
      }
    }
  } else {
    const auto plane = static_cast<unsigned long long>(call.plane());
    const auto mean = static_cast<int>((2 * shared.sum + plane) / (2 * plane));
    for (int value = threadIdx.x; value < 256; value += block_threads) {
      for (int c = 0; c < call.channels; ++c) shared.tables[c][value] = simple_table(step, value, mean);
    }
  }
  __syncthreads();
  image.become([&](int64_t i, int, int, int c) { return shared.tables[c][image.now[i]]; });
}

__device__ void turn(BlockImage& image, const Step& step) {
  const Augment& call = image.call;
  const PixelMap map = map_of(step, call.height, call.width);
  image.become([&](int64_t, int x, int y, int c) {
    const int column = (map.a * x + map.b * y + map.c) >> 16, row = (map.d * x + map.e * y + map.f) >> 16;
    const bool inside = column >= 0 && column < call.width && row >= 0 && row < call.height;
    const int64_t place = c * call.plane() + static_cast<int64_t>(row) * call.width + column;
    return inside ? image.now[place] : static_cast<uint8_t>(call.fill);
  });
}

// Pixels nearer to the border than `reach` stay as they are.
template <class F>
__device__ void filter(BlockImage& image, int reach, const F& value) {
  const Augment& call = image.call;
  image.become([&](int64_t i, int x, int y, int) {
    const bool inner = x >= reach && x < call.width - reach && y >= reach && y < call.height - reach;
    return inner ? value(image.now + i, call.width) : image.now[i];
  });
}

// Along the rows, then along the columns; as many pixels of the side at a time as there are threads.
__device__ void rescale(BlockImage& image, const Step& step, Shared& shared) {
  const Augment& call = image.call;
  for (const bool along_rows : {true, false}) {
    const int side = along_rows ? call.width : call.height;
    const Enlargement enlarged(step.level, side);
    const int64_t stride = along_rows ? 1 : call.width;
    for (int first = 0; first < side; first += block_threads) {
      const int at = first + static_cast<int>(threadIdx.x);
      if (at < side) shared.taps[threadIdx.x] = taps_at(enlarged, step.operation, at);
      __syncthreads();
      const int group = side - first < block_threads ? side - first : block_threads;
      const int inner = along_rows ? group : call.width;
      const int64_t rows = call.channels * static_cast<int64_t>(along_rows ? call.height : group);
      for (int64_t i = threadIdx.x; i < rows * inner; i += block_threads) {
        const int64_t row = i / inner;
        const int64_t y = along_rows ? row : row / group * call.height + first + row % group;
        const int64_t x = along_rows ? first + i % inner : i % inner;
        const int place = static_cast<int>(along_rows ? i % inner : row % group);
        const Taps& taps = shared.taps[place];
        const uint8_t* pixel = image.now + y * call.width + x + (taps.first - (first + place)) * stride;
        int sum = 1 << (weight_bits - 1);
        for (int k = 0; k < taps.count; ++k) sum += pixel[k * stride] * taps.weights[k];
        image.spare[y * call.width + x] = from_weighted(sum);
      }
      __syncthreads();
    }
    image.turn_over();
  }
}

__device__ void apply(BlockImage& image, const Step& step, Shared& shared) {
  const Augment& call = image.call;
  const auto share = static_cast<float>(step.level);
  if (has_table(step.operation)) {
    put_table(image, step, shared);
  } else if (is_geometric(step.operation)) {
    turn(image, step);
  } else if (step.operation >= Operation::rescale_lanczos) {
    rescale(image, step, shared);
  } else if (step.operation == Operation::color && call.channels == 3) {
    image.become([&](int64_t i, int x, int y, int) {
      return blend(luma_at(image, static_cast<int64_t>(y) * call.width + x), image.now[i], share);
    });
  } else if (step.operation == Operation::blur) {
    filter(image, 2, [=](const uint8_t* at, int width) { return blend(*at, blurred(at, width), share); });
  } else if (step.operation == Operation::smooth) {
    filter(image, 1, [=](const uint8_t* at, int width) { return blend(*at, smoothed(at, width), share); });
  } else if (step.operation == Operation::sharpness) {
    filter(image, 1, [=](const uint8_t* at, int width) { return blend(smoothed(at, width), *at, share); });
  } else if (step.operation == Operation::cutout) {
    const Span rows = covered(step.y, step.level, call.height), columns = covered(step.x, step.level, call.width);
    image.become([&](int64_t i, int x, int y, int c) {
      const bool inside = x >= columns.first && x < columns.last && y >= rows.first && y < rows.last;
      return inside ? static_cast<uint8_t>(call.square[c]) : image.now[i];
    });
  }
}

__global__ void __launch_bounds__(block_threads, 2) augment_images(FASTMETA_STRUCTURE(Augment) call, uint8_t* buffers) {
  FASTMETA_SHARED(Shared, shared, 1);
  const int64_t n = blockIdx.x, size = call.size();
  BlockImage image{call, call.images + n * size, buffers + 2 * n * size, buffers + (2 * n + 1) * size};
  if (call.moves != nullptr) move(image, call.moves + 3 * n);
  for (int step = 0; step < call.steps; ++step) apply(image, step_of(call, n, step), *shared);
  if (call.unit) {
    float* out = static_cast<float*>(call.out) + n * size;
    for (int64_t i = threadIdx.x; i < size; i += block_threads) out[i] = to_unit(image.now[i]);
  } else {
    uint8_t* out = static_cast<uint8_t*>(call.out) + n * size;
    for (int64_t i = threadIdx.x; i < size; i += block_threads) out[i] = image.now[i];
  }
}

Tensor augment_tensors(const Tensor& images, const std::optional<Tensor>& moves, const Tensor& operations,
                       const Tensor& levels, const std::optional<Tensor>& places, int64_t fill, int64_t red,
                       int64_t green, int64_t blue, bool reflected, bool unit) {
  const AugmentCall call(images, moves, operations, levels, places, {fill, red, green, blue}, reflected, unit);
  const Augment& augment = call.arguments;
  const Launcher launch("augment", images);
  const Tensor buffers = launch.scratch((2 * augment.count * augment.size() + 3) / 4);
  launch(augment_images, {.blocks = dim3(static_cast<unsigned>(augment.count)), .threads = dim3(block_threads)},
         augment, static_cast<uint8_t*>(buffers.mutable_data_ptr()));
  return call.out;
}

}  // namespace
}  // namespace fastmeta

STABLE_TORCH_LIBRARY_IMPL(FASTMETA_NAMESPACE, FASTMETA_DEVICE_KEY, m) {
  m.impl("augment", TORCH_BOX(&fastmeta::augment_tensors));
}
