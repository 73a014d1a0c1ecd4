// One kernel launch of a program.
#pragma once

#include <array>
#include <cstring>
#include <vector>

#include "driver.h"
#include "program.h"

namespace fastmeta {

// A kernel's parameter: an address, a number of the call as float32, or eight bytes that never change.
struct Parameter {
  enum class Kind { address, number, constant } kind;
  Address address;
  Number number;
  uint64_t constant;
};

class LaunchStep final : public Step {
 public:
  static constexpr size_t most_parameters = 64;

  LaunchStep(void* function, std::array<unsigned, 3> grid, unsigned threads, unsigned shared_bytes,
             std::vector<Parameter> parameters)
      : function_(function), grid_(grid), threads_(threads), shared_bytes_(shared_bytes), parameters_(parameters) {}

  void run(const Call& call) const override {
    if (grid_[0] == 0 || grid_[1] == 0 || grid_[2] == 0) return;
    std::array<uint64_t, most_parameters> values;
    std::array<void*, most_parameters> places;
    for (size_t i = 0; i < parameters_.size(); ++i) {
      const Parameter& parameter = parameters_[i];
      switch (parameter.kind) {
        case Parameter::Kind::address:
          values[i] = reinterpret_cast<uint64_t>(call.at(parameter.address));
          break;
        case Parameter::Kind::number: {
          const auto number = static_cast<float>(parameter.number.in(call.numbers));
          std::memcpy(&values[i], &number, sizeof number);
          break;
        }
        case Parameter::Kind::constant:
          values[i] = parameter.constant;
          break;
      }
      places[i] = &values[i];
    }
    check_launch(driver().launch(function_, grid_[0], grid_[1], grid_[2], threads_, 1, 1, shared_bytes_, call.stream,
                                 places.data(), nullptr));
  }

 private:
  void* function_;
  std::array<unsigned, 3> grid_;
  unsigned threads_, shared_bytes_;
  std::vector<Parameter> parameters_;
};

}  // namespace fastmeta
