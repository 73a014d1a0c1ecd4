// What the operations of augmentation are made of, on the CPU and on the GPU: Pillow's arithmetic, to the bit.
// fastmeta/data/augment/reference.py is the definition, operations.py beside it says what levels mean.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define FASTMETA_PIXEL_FUNCTION __host__ __device__ __forceinline__
#else
#define FASTMETA_PIXEL_FUNCTION inline __attribute__((always_inline))
// A product is rounded before it is added to something.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif
#endif

namespace fastmeta {

// As in operations.py.
enum class Operation : int {
  identity,
  autocontrast,
  equalize,
  rotate,
  solarize,
  color,
  contrast,
  brightness,
  sharpness,
  shear_x,
  shear_y,
  translate_x,
  translate_y,
  posterize,
  invert,
  blur,
  smooth,
  cutout,
  rescale_lanczos,
  rescale_bicubic,
  rescale_bilinear,
  rescale_box,
  rescale_hamming,
  rescale_nearest,
  count
};

constexpr int largest_side = 8192;

// A call. Everything is contiguous.
struct Augment {
  const uint8_t* images;      // [N, C, H, W]
  const int32_t* moves;       // [N, 3]: rows, columns, whether left and right are exchanged; or null
  const int64_t* operations;  // [N, D]
  const float* levels;        // [N, D]
  const float* places;        // [N, D, 2]; or null
  void* out;                  // [N, C, H, W], uint8 or float32 in [0, 1]
  int64_t count;
  int channels, height, width, steps;
  int fill;
  int square[3];
  bool reflected, unit;

  FASTMETA_PIXEL_FUNCTION int64_t plane() const { return static_cast<int64_t>(height) * width; }
  FASTMETA_PIXEL_FUNCTION int64_t size() const { return channels * plane(); }
};

// One operation of one image.
struct Step {
  Operation operation;
  double level;
  double x, y;  // of the cutout's middle
};

// NaN becomes `low`.
FASTMETA_PIXEL_FUNCTION double between(double value, double low, double high) {
  return !(value > low) ? low : value > high ? high : value;
}

FASTMETA_PIXEL_FUNCTION double bounded(Operation operation, double level) {
  if (!(level == level)) level = 0;
  switch (operation) {
    case Operation::autocontrast:
    case Operation::equalize:
    case Operation::invert:
    case Operation::blur:
    case Operation::smooth:
      return between(level, 0, 1);
    case Operation::rotate:
      return between(level, -360, 360);
    case Operation::solarize:
      return between(level, 0, 256);
    case Operation::color:
    case Operation::contrast:
    case Operation::brightness:
    case Operation::sharpness:
      return between(level, 0, 16);
    case Operation::shear_x:
    case Operation::shear_y:
      return between(level, -1, 1);
    case Operation::translate_x:
    case Operation::translate_y:
      return between(level, -largest_side, largest_side);
    case Operation::posterize:
      return between(level, 1, 8);
    case Operation::cutout:
      return between(level, 0, 2 * largest_side);
    case Operation::identity:
    case Operation::count:
      return 0;
    default:
      return between(level, 0, 0.25);
  }
}

FASTMETA_PIXEL_FUNCTION bool is_operation(int64_t code) {
  return code >= 0 && code < static_cast<int64_t>(Operation::count);
}

// A code that is none is the identity.
FASTMETA_PIXEL_FUNCTION Step step_of(const Augment& a, int64_t image, int step) {
  const int64_t i = image * a.steps + step, code = a.operations[i];
  const auto operation = is_operation(code) ? static_cast<Operation>(static_cast<int>(code)) : Operation::identity;
  return {operation, bounded(operation, a.levels[i]), a.places ? a.places[2 * i] : a.width / 2.0,
          a.places ? a.places[2 * i + 1] : a.height / 2.0};
}

FASTMETA_PIXEL_FUNCTION float product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
FASTMETA_PIXEL_FUNCTION double product(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// Image.blend: first + share (second - first), cut to [0, 255] and then to a whole number.
FASTMETA_PIXEL_FUNCTION uint8_t blend(int first, int second, float share) {
  float value = static_cast<float>(first) + product(share, static_cast<float>(second - first));
  value = value < 0.0f ? 0.0f : value;
  value = value > 255.0f ? 255.0f : value;
  return static_cast<uint8_t>(static_cast<int>(value));
}

FASTMETA_PIXEL_FUNCTION float over_255(float value) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(value, 255.0f);
#else
  return value / 255.0f;
#endif
}
FASTMETA_PIXEL_FUNCTION float to_unit(uint8_t value) { return over_255(static_cast<float>(value)); }

// Image.convert("L"): ITU-R 601.
FASTMETA_PIXEL_FUNCTION int luma(int red, int green, int blue) {
  return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16;
}

// Tables: what becomes of a value.

FASTMETA_PIXEL_FUNCTION bool has_table(Operation operation) {
  switch (operation) {
    case Operation::autocontrast:
    case Operation::equalize:
    case Operation::solarize:
    case Operation::contrast:
    case Operation::brightness:
    case Operation::posterize:
    case Operation::invert:
      return true;
    default:
      return false;
  }
}

// ImageOps.autocontrast: takes `low` to 0 and `high` to 255.
struct Stretch {
  double scale = 1, offset = 0;

  FASTMETA_PIXEL_FUNCTION Stretch(int low, int high) {
    if (high <= low) return;
    scale = 255.0 / (high - low);
    offset = product(-static_cast<double>(low), scale);
  }
  FASTMETA_PIXEL_FUNCTION int operator()(int value) const {
    return static_cast<int>(between(product(static_cast<double>(value), scale) + offset, 0, 255));
  }
};

// ImageOps.equalize: `greatest` of the channel's pixels have the greatest value of all.
struct Even {
  int step;

  FASTMETA_PIXEL_FUNCTION Even(int greatest, int plane) : step((plane - greatest) / 255) {}
  // `below` pixels have a lesser value. A quotient of whole numbers as small as these is right in float64.
  FASTMETA_PIXEL_FUNCTION int operator()(int value, int below) const {
    if (step == 0) return value;
    const double even = static_cast<double>(below + step / 2) / step;
    return static_cast<int>(even > 255 ? 255 : even);
  }
};

// Of the tables that read nothing of the image, and of contrast, with the mean of the luma.
FASTMETA_PIXEL_FUNCTION uint8_t simple_table(const Step& step, int value, int mean) {
  const auto share = static_cast<float>(step.level);
  switch (step.operation) {
    case Operation::solarize:
      return static_cast<uint8_t>(value < step.level ? value : 255 - value);
    case Operation::contrast:
      return blend(mean, value, share);
    case Operation::brightness:
      return blend(0, value, share);
    case Operation::posterize:
      return static_cast<uint8_t>(value & (256 - (1 << (8 - static_cast<int>(step.level)))));
    default:
      return blend(value, 255 - value, share);
  }
}

// ImageFilter.SMOOTH.
FASTMETA_PIXEL_FUNCTION int smoothed(const uint8_t* at, int width) {
  const uint8_t *above = at - width, *below = at + width;
  const int sum = above[-1] + above[0] + above[1] + at[-1] + 5 * at[0] + at[1] + below[-1] + below[0] + below[1];
  return (2 * sum + 13) / 26;
}

// ImageFilter.BLUR.
FASTMETA_PIXEL_FUNCTION int blurred(const uint8_t* at, int width) {
  const uint8_t *first = at - 2 * width, *last = at + 2 * width;
  int sum = 8;
  for (int x = -2; x <= 2; ++x) sum += first[x] + last[x];
  for (int y = -1; y <= 1; ++y) sum += at[y * width - 2] + at[y * width + 2];
  return sum / 16;
}

// The affine map of a geometric operation: pixel (x, y) shows what lay at (a x + b y + c, d x + e y + f) / 2^16.
struct PixelMap {
  int a, b, c, d, e, f;
};

FASTMETA_PIXEL_FUNCTION int fixed_point(double value) { return static_cast<int>(floor(product(value, 65536.0) + 0.5)); }

FASTMETA_PIXEL_FUNCTION bool is_geometric(Operation operation) {
  return operation == Operation::rotate || (operation >= Operation::shear_x && operation <= Operation::translate_y);
}

FASTMETA_PIXEL_FUNCTION PixelMap map_of(const Step& step, int height, int width) {
  PixelMap map{65536, 0, 32768, 0, 65536, 32768};  // half a pixel leads to a pixel's middle
  switch (step.operation) {
    case Operation::rotate: {
      const double angle = product(-step.level, 3.14159265358979323846 / 180), cosine = cos(angle), sine = sin(angle);
      const double x = width / 2.0, y = height / 2.0;  // what turns, turns about the middle
      const double c = x - (product(cosine, x) + product(sine, y)) + 0.5 * cosine + 0.5 * sine;
      const double f = y - (product(cosine, y) - product(sine, x)) - 0.5 * sine + 0.5 * cosine;
      map = {fixed_point(cosine), fixed_point(sine),   fixed_point(c),
             fixed_point(-sine),  fixed_point(cosine), fixed_point(f)};
      break;
    }
    case Operation::shear_x:
      map.b = fixed_point(step.level);
      map.c = fixed_point(0.5 + 0.5 * step.level);
      break;
    case Operation::shear_y:
      map.d = fixed_point(step.level);
      map.f = fixed_point(0.5 * step.level + 0.5);
      break;
    case Operation::translate_x:
      map.c += static_cast<int>(floor(step.level + 0.5)) * 65536;
      break;
    default:
      map.f += static_cast<int>(floor(step.level + 0.5)) * 65536;
  }
  return map;
}

// Of what the cutout's square covers along one side, the first pixel, and that after the last.
struct Span {
  int first, last;
};

FASTMETA_PIXEL_FUNCTION Span covered(double middle, double length, int side) {
  const double first = ceil(middle - length / 2 - 0.5), last = ceil(middle + length / 2 - 0.5);
  return {static_cast<int>(between(first, 0, side)), static_cast<int>(between(last, 0, side))};
}

// Where a weak view's pixel lay: a place beyond the image is mirrored, or -1 where zeros move in.
FASTMETA_PIXEL_FUNCTION int moved_place(int place, int side, bool reflected) {
  if (place >= 0 && place < side) return place;
  if (!reflected) return -1;
  const int mirrored = place < 0 ? -place : 2 * (side - 1) - place;
  return mirrored < 0 ? 0 : mirrored >= side ? side - 1 : mirrored;
}

// Image.crop and Image.resize along one side: the ends are cut off, the rest is enlarged.

constexpr int most_taps = 7;     // pixels that the widest filter takes
constexpr int weight_bits = 22;  // of its weights after the point

// A pixel of the result is the sum of these of the source.
struct Taps {
  int first, count;
  int weights[most_taps];
};

FASTMETA_PIXEL_FUNCTION double sinc(double x) {
  if (x == 0) return 1;
  const double angle = product(x, 3.14159265358979323846);
  return sin(angle) / angle;
}

FASTMETA_PIXEL_FUNCTION double filter_reach(Operation operation) {
  switch (operation) {
    case Operation::rescale_lanczos:
      return 3;
    case Operation::rescale_bicubic:
      return 2;
    case Operation::rescale_box:
      return 0.5;
    default:
      return 1;
  }
}

FASTMETA_PIXEL_FUNCTION double filter_weight(Operation operation, double x) {
  const double size = fabs(x);
  switch (operation) {
    case Operation::rescale_lanczos:
      return x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0;
    case Operation::rescale_bicubic:
      if (size < 1) return product(product(1.5 * size - 2.5, size), size) + 1;
      return size < 2 ? (product(product(size - 5, size) + 8, size) - 4) * -0.5 : 0;
    case Operation::rescale_bilinear:
      return size < 1 ? 1 - size : 0;
    case Operation::rescale_box:
      return x > -0.5 && x <= 0.5 ? 1 : 0;
    default:  // hamming, with Pillow's numbers, which are float32
      return size < 1 ? sinc(x) * (0.54f + product(double{0.46f}, cos(product(x, 3.14159265358979323846)))) : 0;
  }
}

struct Enlargement {
  int first, length;  // what is left of the source
  double scale;

  FASTMETA_PIXEL_FUNCTION Enlargement(double cut, int side)
      : first(static_cast<int>(rint(product(cut, side)))),
        length(static_cast<int>(rint(product(side, 1 - cut))) - first),
        scale(static_cast<double>(length) / side) {}

  FASTMETA_PIXEL_FUNCTION Taps taps(Operation operation, int x) const {
    const double middle = product(x + 0.5, scale), reach = filter_reach(operation);
    const int begin = static_cast<int>(between(middle - reach + 0.5, 0, length));
    const int end = static_cast<int>(between(middle + reach + 0.5, 0, length));
    Taps taps{first + begin, end - begin, {}};
    double weights[most_taps], sum = 0;
    for (int i = 0; i < taps.count; ++i) {
      weights[i] = filter_weight(operation, begin + i - middle + 0.5);
      sum += weights[i];
    }
    for (int i = 0; i < taps.count; ++i) {
      const double scaled = product(weights[i] / sum, 1 << weight_bits);
      taps.weights[i] = static_cast<int>(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
    }
    return taps;
  }

  // To the nearest pixel: the places are added up one by one.
  FASTMETA_PIXEL_FUNCTION Taps nearest(double place) const {
    return {first + static_cast<int>(place), 1, {1 << weight_bits}};
  }
};

// Of the pixel `at` by itself.
FASTMETA_PIXEL_FUNCTION Taps taps_at(const Enlargement& enlarged, Operation operation, int at) {
  if (operation != Operation::rescale_nearest) return enlarged.taps(operation, at);
  double place = enlarged.scale * 0.5;
  for (int i = 0; i < at; ++i) place += enlarged.scale;
  return enlarged.nearest(place);
}

FASTMETA_PIXEL_FUNCTION uint8_t from_weighted(int sum) {
  const int value = sum >> weight_bits;
  return static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
}

}  // namespace fastmeta
