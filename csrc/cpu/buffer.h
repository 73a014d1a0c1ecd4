// Scratch memory of a call, aligned for the widest vectors and not initialised. Small buffers come from memory that
// each thread keeps, so that a small call does not allocate.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace fastmeta {

constexpr std::align_val_t buffer_alignment{64};

struct FreeAligned {
  void operator()(char* data) const { ::operator delete(data, buffer_alignment); }
};
using AlignedMemory = std::unique_ptr<char, FreeAligned>;

inline AlignedMemory aligned_memory(int64_t bytes) {
  return AlignedMemory(static_cast<char*>(::operator new(static_cast<size_t>(bytes), buffer_alignment)));
}

// A stack: buffers are local variables, so a thread destroys them in the reverse order of their construction.
struct ThreadScratch {
  static constexpr int64_t capacity = 256 << 10;
  AlignedMemory memory;
  int64_t used = 0;
};

inline ThreadScratch& thread_scratch() {
  static thread_local ThreadScratch scratch;
  return scratch;
}

template <class A>
class Buffer {
 public:
  explicit Buffer(int64_t size) : bytes_((size * static_cast<int64_t>(sizeof(A)) + 63) / 64 * 64) {
    ThreadScratch& scratch = thread_scratch();
    if (scratch.used + bytes_ > ThreadScratch::capacity) {
      own_ = aligned_memory(bytes_);
      data_ = reinterpret_cast<A*>(own_.get());
      return;
    }
    if (scratch.memory == nullptr) scratch.memory = aligned_memory(ThreadScratch::capacity);
    data_ = reinterpret_cast<A*>(scratch.memory.get() + scratch.used);
    scratch.used += bytes_;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    if (own_ == nullptr) thread_scratch().used -= bytes_;
  }
  A* data() const { return data_; }

 private:
  int64_t bytes_;
  AlignedMemory own_;
  A* data_;
};

}  // namespace fastmeta
