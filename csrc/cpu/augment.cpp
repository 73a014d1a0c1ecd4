// augment: a weak view's shift and flip, then operations on 8-bit images, each with its own; see augment.h.
#include "augment.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "augment_call.h"
#include "cpu/buffer.h"

namespace fastmeta {
namespace {

// An image on its way. Tables, which take a value of a channel to another, are put together and wait until pixels are
// moved about or written, so that operations of values alone cost one pass.
class Picture {
 public:
  explicit Picture(const Augment& call)
      : call_(call),
        height_(call.height),
        width_(call.width),
        plane_(call.plane()),
        pixels_(2 * call.size()),
        places_(width_),
        taps_(std::max(height_, width_)) {}

  // From the source through the operations to the result.
  void run(int64_t image) {
    now_ = call_.images + image * call_.size();
    forget_tables();
    if (call_.moves != nullptr) move(call_.moves + 3 * image);
    Span rows{0, 0}, columns{0, 0};
    for (int i = 0; i < call_.steps; ++i) {
      const Step step = step_of(call_, image, i);
      if (step.operation != Operation::cutout) {
        apply(step);
        continue;
      }
      rows = covered(step.y, step.level, height_);
      columns = covered(step.x, step.level, width_);
      if (i + 1 == call_.steps) break;  // painted on the result
      paint(flushed(true), rows, columns);
      rows = columns = {0, 0};
    }
    if (call_.unit) {
      float* out = static_cast<float*>(call_.out) + image * call_.size();
      write(out);
      paint(out, rows, columns);
    } else {
      uint8_t* out = static_cast<uint8_t*>(call_.out) + image * call_.size();
      look_up(out);
      paint(out, rows, columns);
    }
  }

 private:
  // The buffer that the image is not in.
  uint8_t* spare() const { return pixels_.data() + (now_ == pixels_.data() ? call_.size() : 0); }

  void forget_tables() {
    plain_ = true;
    for (auto& table : tables_) {
      for (int value = 0; value < 256; ++value) table[value] = static_cast<uint8_t>(value);
    }
  }

  void look_up(uint8_t* out) const {
    if (plain_) {
      std::memcpy(out, now_, call_.size());
      return;
    }
    for (int c = 0; c < call_.channels; ++c) {
      const uint8_t *in = now_ + c * plane_, *table = tables_[c];
      uint8_t* to = out + c * plane_;
      for (int64_t i = 0, count = plane_; i < count; ++i) to[i] = table[in[i]];
    }
  }

  void write(float* out) const {
    if (plain_) {
      const uint8_t* in = now_;
      for (int64_t i = 0, count = call_.size(); i < count; ++i) out[i] = to_unit(in[i]);
      return;
    }
    for (int c = 0; c < call_.channels; ++c) {
      float table[256];
      for (int value = 0; value < 256; ++value) table[value] = to_unit(tables_[c][value]);
      const uint8_t* in = now_ + c * plane_;
      float* to = out + c * plane_;
      for (int64_t i = 0; i < plane_; ++i) to[i] = table[in[i]];
    }
  }

  // The pixels after the tables; in memory that may be written to, if asked.
  uint8_t* flushed(bool own) {
    const bool ours = now_ >= pixels_.data() && now_ < pixels_.data() + 2 * call_.size();
    if (plain_ && (ours || !own)) return const_cast<uint8_t*>(now_);
    uint8_t* out = spare();
    look_up(out);
    now_ = out;
    forget_tables();
    return out;
  }

  template <class T>
  void paint(T* out, Span rows, Span columns) const {
    for (int c = 0; c < call_.channels; ++c) {
      const auto square = static_cast<uint8_t>(call_.square[c]);
      const T color = std::is_same_v<T, float> ? static_cast<T>(to_unit(square)) : static_cast<T>(square);
      for (int y = rows.first; y < rows.last; ++y) {
        T* row = out + c * plane_ + static_cast<int64_t>(y) * width_;
        std::fill(row + columns.first, row + std::max(columns.first, columns.last), color);
      }
    }
  }

  void move(const int32_t* move) {
    const int down = move[0], right = move[1];
    const bool flip = move[2] != 0;
    uint8_t* out = spare();
    int* places = places_.data();
    for (int x = 0; x < width_; ++x) {
      places[x] = moved_place(right + (flip ? width_ - 1 - x : x), width_, call_.reflected);
    }
    // Those columns whose places lie side by side.
    const int first = std::clamp(flip ? right : -right, 0, width_);
    const int last = std::clamp(flip ? width_ + right : width_ - right, first, width_);
    for (int c = 0; c < call_.channels; ++c) {
      for (int y = 0; y < height_; ++y) {
        uint8_t* to = out + c * plane_ + static_cast<int64_t>(y) * width_;
        const int row = moved_place(y + down, height_, call_.reflected);
        if (row < 0) {
          std::memset(to, 0, width_);
          continue;
        }
        const uint8_t* from = now_ + c * plane_ + static_cast<int64_t>(row) * width_;
        for (int x = 0; x < first; ++x) to[x] = places[x] < 0 ? 0 : from[places[x]];
        if (first < last && flip) {
          reverse(from + places[last - 1], to + first, last - first);
        } else if (first < last) {
          std::memcpy(to + first, from + places[first], last - first);
        }
        for (int x = last; x < width_; ++x) to[x] = places[x] < 0 ? 0 : from[places[x]];
      }
    }
    now_ = out;
  }

  static void reverse(const uint8_t* from, uint8_t* to, int count) {
    int x = 0;
    for (; x + 8 <= count; x += 8) {
      uint64_t eight;
      std::memcpy(&eight, from + count - 8 - x, 8);
      eight = __builtin_bswap64(eight);
      std::memcpy(to + x, &eight, 8);
    }
    for (; x < count; ++x) to[x] = from[count - 1 - x];
  }

  void apply(const Step& step) {
    const auto share = static_cast<float>(step.level);
    if (has_table(step.operation)) {
      put_table(step, share);
    } else if (is_geometric(step.operation)) {
      turn(map_of(step, height_, width_));
    } else if (step.operation >= Operation::rescale_lanczos) {
      rescale(step.operation, step.level);
    } else if (step.operation == Operation::color) {
      if (call_.channels == 3) color(share);
    } else if (step.operation == Operation::blur) {
      filter(2, [=](const uint8_t* at, int width) { return blend(*at, blurred(at, width), share); });
    } else if (step.operation == Operation::smooth) {
      filter(1, [=](const uint8_t* at, int width) { return blend(*at, smoothed(at, width), share); });
    } else if (step.operation == Operation::sharpness) {
      filter(1, [=](const uint8_t* at, int width) { return blend(smoothed(at, width), *at, share); });
    }
  }

  void put_table(const Step& step, float share) {
    const bool reads = step.operation == Operation::autocontrast || step.operation == Operation::equalize;
    uint8_t rule[256];
    if (!reads) {
      const int mean = step.operation == Operation::contrast ? mean_luma() : 0;
      for (int value = 0; value < 256; ++value) rule[value] = simple_table(step, value, mean);
    }
    if (reads) flushed(false);
    for (int c = 0; c < call_.channels; ++c) {
      if (step.operation == Operation::autocontrast) stretch(now_ + c * plane_, share, rule);
      if (step.operation == Operation::equalize) equalize(now_ + c * plane_, share, rule);
      for (uint8_t& value : tables_[c]) value = rule[value];
    }
    plain_ = false;
  }

  int mean_luma() {
    const uint8_t* in = flushed(false);
    int64_t sum = 0;
    for (int y = 0; y < height_; ++y, in += width_) {
      uint32_t row = 0;
      if (call_.channels == 3) {
        for (int x = 0; x < width_; ++x) row += luma(in[x], in[plane_ + x], in[2 * plane_ + x]);
      } else {
        for (int x = 0; x < width_; ++x) row += in[x];
      }
      sum += row;
    }
    return static_cast<int>((2 * sum + plane_) / (2 * plane_));
  }

  void stretch(const uint8_t* in, float share, uint8_t* rule) const {
    uint8_t low = 255, high = 0;
    for (int64_t i = 0, count = plane_; i < count; ++i) {
      low = in[i] < low ? in[i] : low;
      high = in[i] > high ? in[i] : high;
    }
    const Stretch stretch(low, high);
    for (int value = 0; value < 256; ++value) rule[value] = blend(value, stretch(value), share);
  }

  void equalize(const uint8_t* in, float share, uint8_t* rule) const {
    int counts[2][256] = {};  // two: equal values side by side would wait for each other
    for (int64_t i = 0; i < plane_; ++i) ++counts[i % 2][in[i]];
    int greatest = 0;
    for (int value = 0; value < 256; ++value) {
      counts[0][value] += counts[1][value];
      greatest = counts[0][value] > 0 ? counts[0][value] : greatest;
    }
    const Even even(greatest, static_cast<int>(plane_));
    for (int value = 0, below = 0; value < 256; ++value) {
      rule[value] = blend(value, even(value, below), share);
      below += counts[0][value];
    }
  }

  void color(float share) {
    const int64_t count = plane_;
    const uint8_t* in = flushed(false);
    uint8_t* __restrict out = spare();
    for (int64_t i = 0; i < count; ++i) {
      const int red = in[i], green = in[count + i], blue = in[2 * count + i], gray = luma(red, green, blue);
      out[i] = blend(gray, red, share);
      out[count + i] = blend(gray, green, share);
      out[2 * count + i] = blend(gray, blue, share);
    }
    now_ = out;
  }

  // The pixels that lie `reach` from the border or further become value(pixel, width); too small an image has none.
  template <class F>
  void filter(int reach, const F& value) {
    const int width = width_;
    const uint8_t* in = flushed(false);
    uint8_t* out = spare();
    std::memcpy(out, in, call_.size());
    for (int c = 0; c < call_.channels; ++c) {
      for (int y = reach; y < height_ - reach; ++y) {
        const uint8_t* from = in + c * plane_ + static_cast<int64_t>(y) * width;
        uint8_t* __restrict to = out + (from - in);
        for (int x = reach; x < width - reach; ++x) to[x] = value(from + x, width);
      }
    }
    now_ = out;
  }

  void turn(const PixelMap& map) {
    const uint8_t* in = flushed(false);
    uint8_t* out = spare();
    int* __restrict places = places_.data();
    const auto fill = static_cast<uint8_t>(call_.fill);
    const int width = width_;
    for (int y = 0; y < height_; ++y) {
      const int column = map.b * y + map.c, row = map.e * y + map.f;
      if (map.a == 65536 && map.d == 0) {  // all but rotations and shear-y: a row is shifted as a whole
        for (int c = 0; c < call_.channels; ++c) {
          shift_row(in + c * plane_, row >> 16, column >> 16, out + c * plane_ + static_cast<int64_t>(y) * width);
        }
        continue;
      }
      for (int x = 0; x < width; ++x) {
        const int from_x = (map.a * x + column) >> 16, from_y = (map.d * x + row) >> 16;
        const bool inside = static_cast<unsigned>(from_x) < static_cast<unsigned>(width) &&
                            static_cast<unsigned>(from_y) < static_cast<unsigned>(height_);
        places[x] = inside ? from_y * width + from_x : -1;
      }
      for (int c = 0; c < call_.channels; ++c) {
        const uint8_t* from = in + c * plane_;
        uint8_t* __restrict to = out + c * plane_ + static_cast<int64_t>(y) * width;
        for (int x = 0; x < width; ++x) to[x] = places[x] < 0 ? fill : from[places[x]];
      }
    }
    now_ = out;
  }

  void shift_row(const uint8_t* plane, int row, int shift, uint8_t* out) const {
    const bool inside = row >= 0 && row < height_;
    const int first = inside ? std::clamp(-shift, 0, width_) : width_;
    const int last = std::clamp(width_ - shift, first, width_);
    std::memset(out, call_.fill, first);
    if (first < last)
      std::memcpy(out + first, plane + static_cast<int64_t>(row) * width_ + first + shift, last - first);
    std::memset(out + last, call_.fill, width_ - last);
  }

  void rescale(Operation operation, double cut) {
    for (const bool along_rows : {true, false}) {
      const int side = along_rows ? width_ : height_;
      const Enlargement enlarged(cut, side);
      double place = enlarged.scale * 0.5;
      for (int i = 0; i < side; ++i, place += enlarged.scale) {
        taps_.data()[i] =
            operation == Operation::rescale_nearest ? enlarged.nearest(place) : enlarged.taps(operation, i);
      }
      const uint8_t* in = flushed(false);
      uint8_t* out = spare();
      const int64_t stride = along_rows ? 1 : width_;
      for (int64_t row = 0; row < call_.channels * static_cast<int64_t>(height_); ++row) {
        const int y = static_cast<int>(row % height_);
        const uint8_t* from = in + (along_rows ? row : row - y) * width_;
        for (int x = 0; x < width_; ++x) {
          const Taps& taps = taps_.data()[along_rows ? x : y];
          const uint8_t* pixel = from + (along_rows ? 0 : x) + taps.first * stride;
          int sum = 1 << (weight_bits - 1);
          for (int i = 0; i < taps.count; ++i) sum += pixel[i * stride] * taps.weights[i];
          out[row * width_ + x] = from_weighted(sum);
        }
      }
      now_ = out;
    }
  }

  const Augment& call_;
  const int height_, width_;
  const int64_t plane_;
  const Buffer<uint8_t> pixels_;  // two images
  const Buffer<int> places_;      // [W]
  const Buffer<Taps> taps_;
  const uint8_t* now_ = nullptr;
  uint8_t tables_[3][256];
  bool plain_ = true;  // whether the tables change nothing
};

Tensor augment_tensors(const Tensor& images, const std::optional<Tensor>& moves, const Tensor& operations,
                       const Tensor& levels, const std::optional<Tensor>& places, int64_t fill, int64_t red,
                       int64_t green, int64_t blue, bool reflected, bool unit) {
  const AugmentCall call(images, moves, operations, levels, places, {fill, red, green, blue}, reflected, unit);
  const Augment& augment = call.arguments;
  for (int64_t i = 0; i < augment.count * augment.steps; ++i) {
    STD_TORCH_CHECK(is_operation(augment.operations[i]), "operations must lie in 0 .. ",
                    static_cast<int>(Operation::count) - 1, ", got ", augment.operations[i]);
  }
  constexpr int64_t least_pixels = 32768;  // for a thread to wake
  const int64_t grain = std::max<int64_t>(1, least_pixels / std::max<int64_t>(1, augment.size()));
  torch::stable::parallel_for(0, augment.count, grain, [&](int64_t first, int64_t last) {
    Picture picture(augment);
    for (int64_t image = first; image < last; ++image) picture.run(image);
  });
  return call.out;
}

}  // namespace
}  // namespace fastmeta

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) { m.impl("augment", TORCH_BOX(&fastmeta::augment_tensors)); }
