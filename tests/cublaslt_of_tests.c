// cuBLASLt on the host, as its documentation says what a product is: column-major matrices, operations, epilogues. It
// takes float32 and bfloat16, and checks what a caller must keep to. Compiled by test_products.py.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  int type;
  uint64_t rows, columns;
  int64_t leading;
} Layout;
typedef struct {
  int compute, scale;
  int32_t trans_a, trans_b;
  uint32_t epilogue;
  void *vector;
} Desc;
typedef struct {
  uint64_t workspace;
  uint32_t reduction, alignment[4];
} Preference;
typedef struct {
  uint64_t data[8];
} Algorithm;
typedef struct {
  Algorithm algorithm;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
} Heuristic;

static uint32_t refused;   // epilogues that have no algorithm
static Preference asked;   // by the last heuristic
static Desc last;          // descriptor of the last product
static int live;           // objects that were made and not destroyed
void refuse(uint32_t epilogue) { refused = epilogue; }
void asked_for(uint32_t *alignment, uint64_t *others) {
  memcpy(alignment, asked.alignment, sizeof asked.alignment);
  others[0] = asked.workspace;
  others[1] = asked.reduction;
  others[2] = (uint64_t)last.compute;
  others[3] = (uint64_t)live;
  others[4] = last.epilogue;
}

static void *make(size_t size) {
  ++live;
  return calloc(1, size);
}
static int drop(void *object) {
  --live;
  free(object);
  return 0;
}
int cublasLtCreate(void **handle) {
  *handle = &live;
  return 0;
}
int cublasLtMatmulDescCreate(Desc **desc, int compute, int scale) {
  *desc = make(sizeof(Desc));
  (*desc)->compute = compute;
  (*desc)->scale = scale;
  (*desc)->epilogue = 1;
  return 0;
}
int cublasLtMatmulDescDestroy(Desc *desc) { return drop(desc); }
int cublasLtMatmulDescSetAttribute(Desc *desc, int attribute, const void *value, size_t size) {
  switch (attribute) {
    case 3: if (size != 4) return 7; memcpy(&desc->trans_a, value, 4); return 0;
    case 4: if (size != 4) return 7; memcpy(&desc->trans_b, value, 4); return 0;
    case 7: if (size != 4) return 7; memcpy(&desc->epilogue, value, 4); return 0;
    case 8: if (size != 8) return 7; memcpy(&desc->vector, value, 8); return 0;
  }
  return 7;
}
int cublasLtMatrixLayoutCreate(Layout **layout, int type, uint64_t rows, uint64_t columns, int64_t leading) {
  if (leading < (int64_t)rows || (type != 0 && type != 14)) return 7;
  *layout = make(sizeof(Layout));
  **layout = (Layout){type, rows, columns, leading};
  return 0;
}
int cublasLtMatrixLayoutDestroy(Layout *layout) { return drop(layout); }
int cublasLtMatmulPreferenceCreate(Preference **preference) {
  *preference = make(sizeof(Preference));
  return 0;
}
int cublasLtMatmulPreferenceDestroy(Preference *preference) { return drop(preference); }
int cublasLtMatmulPreferenceSetAttribute(Preference *preference, int attribute, const void *value, size_t size) {
  if (attribute == 1 && size == 8) memcpy(&preference->workspace, value, 8);
  else if (attribute == 3 && size == 4) memcpy(&preference->reduction, value, 4);
  else if (attribute >= 5 && attribute <= 8 && size == 4) memcpy(preference->alignment + attribute - 5, value, 4);
  else return 7;
  return 0;
}

static int fits(const Desc *desc, const Layout *a, const Layout *b, const Layout *c, const Layout *d) {
  uint64_t m = desc->trans_a ? a->columns : a->rows, k = desc->trans_a ? a->rows : a->columns;
  uint64_t n = desc->trans_b ? b->rows : b->columns, k_of_b = desc->trans_b ? b->columns : b->rows;
  return k == k_of_b && d->rows == m && d->columns == n && c->rows == m && c->columns == n && desc->scale == 0 &&
         a->type == b->type && c->type == d->type;
}
int cublasLtMatmulAlgoGetHeuristic(void *handle, Desc *desc, Layout *a, Layout *b, Layout *c, Layout *d,
                                   Preference *preference, int requested, Heuristic *results, int *returned) {
  asked = *preference;
  *returned = 0;
  if (handle != &live || requested < 1 || !fits(desc, a, b, c, d)) return 7;
  if (desc->epilogue == refused) return 15;
  *returned = 1;
  memset(results, 0, sizeof *results);
  results->algorithm.data[0] = 77;
  results->workspace = 4096;
  return 0;
}

static float get(const Layout *layout, const void *memory, uint64_t row, uint64_t column) {
  uint64_t at = row + column * (uint64_t)layout->leading;
  if (layout->type == 0) return ((const float *)memory)[at];
  uint32_t bits = (uint32_t)((const uint16_t *)memory)[at] << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
static void put(int type, void *memory, uint64_t at, float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (type == 0) ((float *)memory)[at] = value;
  else ((uint16_t *)memory)[at] = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
int cublasLtMatmul(void *handle, Desc *desc, const float *alpha, const void *a, Layout *la, const void *b, Layout *lb,
                   const float *beta, const void *c, Layout *lc, void *d, Layout *ld, const Algorithm *algorithm,
                   void *workspace, size_t workspace_size, void *stream) {
  if (handle != &live || !fits(desc, la, lb, lc, ld) || algorithm->data[0] != 77) return 7;
  if (!workspace || workspace_size < 4096 || (uintptr_t)workspace % 16) return 7;
  if (c == d && lc->leading != ld->leading) return 7;
  memset(workspace, 0xff, 4096);  // whatever else is kept there is lost
  last = *desc;
  uint64_t m = ld->rows, n = ld->columns, k = desc->trans_a ? la->rows : la->columns;
  Layout vector = {ld->type, m, 1, (int64_t)m};
  for (uint64_t i = 0; i < m; ++i) {
    for (uint64_t j = 0; j < n; ++j) {
      float sum = 0;
      for (uint64_t l = 0; l < k; ++l) {
        float left = desc->trans_a ? get(la, a, l, i) : get(la, a, i, l);
        sum += left * (desc->trans_b ? get(lb, b, j, l) : get(lb, b, l, j));
      }
      float value = *alpha * sum + (*beta == 0 ? 0 : *beta * get(lc, c, i, j));
      if (desc->epilogue == 4) value += get(&vector, desc->vector, i, 0);
      put(ld->type, d, i + j * (uint64_t)ld->leading, value);
    }
  }
  if (desc->epilogue == 256 || desc->epilogue == 512) {
    int of_a = desc->epilogue == 256;
    for (uint64_t i = 0; i < (of_a ? m : n); ++i) {
      float sum = 0;
      for (uint64_t l = 0; l < k; ++l) {
        sum += of_a ? (desc->trans_a ? get(la, a, l, i) : get(la, a, i, l))
                    : (desc->trans_b ? get(lb, b, i, l) : get(lb, b, l, i));
      }
      put(ld->type, desc->vector, i, sum);
    }
  }
  return 0;
}
