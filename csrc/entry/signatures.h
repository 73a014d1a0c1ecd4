// What the fast entry knows of each operator: how many tensors and numbers it takes, which numbers are allowed, and the
// shapes of its results. Arguments come in the order of the schema (csrc/operators.cpp).
#pragma once

#include <cstdint>

#include "../native.h"

namespace fastmeta {

constexpr int most_tensors = 8, most_numbers = 8, most_outputs = 2, most_dimensions = 4;

// A number of a call. Outside [low, high] the call goes the slow way, where Python words the error.
struct NumberRule {
  enum class Kind {
    code,      // an int of an enum: another plan for each
    flag,      // True or False: another plan for each
    number,    // any plan serves every value
    or_zero,   // one plan for 0 and one for every other value
    optional,  // may be None
  } kind;
  double low, high;
};

struct Shape {
  int dimensions;
  int64_t size[2];
};

struct Signature {
  const char* name;
  int num_tensors, num_numbers, num_outputs;
  NumberRule numbers[most_numbers];
  // Fills the shapes of the results; false if the tensors do not have the dimensions to tell.
  bool (*shapes)(const DLTensor* const* tensors, Shape* out);
  int written[4];       // in-place operators: the tensors that are written, else all -1
  int second_if_given;  // the second result is None unless this tensor is given; -1: no such rule
};

// nullptr: no such operator.
const Signature* find_signature(const char* name);

}  // namespace fastmeta
