// The few functions of cuBLASLt that a matrix product takes, found in the library that torch has loaded: building needs
// no CUDA. Names and values are those of NVIDIA's cuBLAS documentation, section "Using the cublasLt API".
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fastmeta::lt {

using Status = int;  // cublasStatus_t; 0 is success
using Handle = struct HandleContext*;
using MatmulDesc = struct MatmulDescContext*;
using Layout = struct LayoutContext*;
using Preference = struct PreferenceContext*;

struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {  // cublasLtMatmulHeuristicResult_t
  Algorithm algorithm;
  size_t workspace_bytes;
  Status state;
  float waves;
  int reserved[4];
};

enum DataType { float32 = 0, float16 = 2, bfloat16 = 14 };     // cudaDataType
enum ComputeType { compute_32f = 68, compute_32f_tf32 = 77 };  // cublasComputeType_t
enum Operation { as_it_is = 0, transposed = 1 };               // cublasOperation_t
enum DescAttribute { trans_a = 3, trans_b = 4, epilogue = 7, bias_pointer = 8 };
enum Epilogue : uint32_t { plain = 1, bias = 4, sums_of_a = 256, sums_of_b = 512 };  // DEFAULT, BIAS, BGRADA, BGRADB
enum PreferenceAttribute {
  max_workspace_bytes = 1,
  reduction_scheme_mask = 3,
  min_alignment_a = 5,  // and B, C, D after it
};
constexpr uint32_t reduce_in_compute_type = 2;  // of split-K parts; the others would round them to the result's dtype

struct Library {
  Status (*create)(Handle*);
  Status (*matmul_desc_create)(MatmulDesc*, ComputeType, DataType scale);
  Status (*matmul_desc_destroy)(MatmulDesc);
  Status (*matmul_desc_set)(MatmulDesc, DescAttribute, const void* value, size_t bytes);
  Status (*layout_create)(Layout*, DataType, uint64_t rows, uint64_t columns, int64_t leading);
  Status (*layout_destroy)(Layout);
  Status (*preference_create)(Preference*);
  Status (*preference_destroy)(Preference);
  Status (*preference_set)(Preference, PreferenceAttribute, const void* value, size_t bytes);
  Status (*heuristic)(Handle, MatmulDesc, Layout a, Layout b, Layout c, Layout d, Preference, int requested,
                      Heuristic* results, int* returned);
  Status (*matmul)(Handle, MatmulDesc, const void* alpha, const void* a, Layout, const void* b, Layout,
                   const void* beta, const void* c, Layout, void* d, Layout, const Algorithm*, void* workspace,
                   size_t workspace_bytes, void* stream);
};

// Takes the first of these libraries that is loaded already, else the first that can be; throws std::runtime_error.
void use(const std::vector<std::string>& names);

// Null until a library is taken.
const Library* library();

// One for each device, made while that device is current.
Handle handle(int device);

}  // namespace fastmeta::lt
