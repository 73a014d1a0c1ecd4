// Copies that bypass the caches, for results too large to be found there again: a plain store first reads the cache
// line.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstring>

#include "cpu/isa.h"

#if FASTMETA_X86
#include <emmintrin.h>
#endif

namespace fastmeta {

// Whether this many bytes do not fit the last-level cache.
inline bool exceeds_cache(int64_t bytes) {
#ifdef _SC_LEVEL3_CACHE_SIZE
  static const int64_t cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
#else
  static const int64_t cache = 0;
#endif
  return bytes > (cache > 0 ? cache : 32 << 20);
}

FASTMETA_INLINE void store(void* to, const void* from, int64_t bytes, bool stream) {
#if FASTMETA_X86
  if (stream) {
    auto* target = static_cast<char*>(to);
    auto* source = static_cast<const char*>(from);
    int64_t head = -reinterpret_cast<intptr_t>(target) & 15;
    if (head > bytes) head = bytes;
    std::memcpy(target, source, head);
    int64_t i = head;
    for (; i + 64 <= bytes; i += 64) {
      const auto* line = reinterpret_cast<const __m128i*>(source + i);
      const __m128i a = _mm_loadu_si128(line), b = _mm_loadu_si128(line + 1);
      const __m128i c = _mm_loadu_si128(line + 2), d = _mm_loadu_si128(line + 3);
      auto* out = reinterpret_cast<__m128i*>(target + i);
      _mm_stream_si128(out, a);
      _mm_stream_si128(out + 1, b);
      _mm_stream_si128(out + 2, c);
      _mm_stream_si128(out + 3, d);
    }
    std::memcpy(target + i, source + i, bytes - i);
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}

// After a thread's last streamed store, before another thread may read.
inline void store_fence(bool stream) {
#if FASTMETA_X86
  if (stream) _mm_sfence();
#endif
}

}  // namespace fastmeta
