// Runs the threads of an emulated block on the CPU: a fiber each, resumed in turn.
//
// FASTMETA_EMULATION_ORDER is `forward`, `reverse` or `random` (the default; the same in every run of a program): the
// order of the blocks, and of the threads between two barriers. A kernel that lacks a barrier gives another result in
// another order, or reads the poison that shared memory starts with.
#include "cuda/emulator.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <array>
#include <cstdlib>
#include <exception>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace fastmeta::emulator {

constinit thread_local Place place{};

namespace {

enum class State { ready, at_barrier, in_warp, done };

// A thread's stack with an unreadable page at its end.
class Stack {
 public:
  Stack() : memory_(mmap(nullptr, size_ + guard_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
    if (memory_ == MAP_FAILED || mprotect(memory_, guard_, PROT_NONE) != 0) throw std::bad_alloc();
  }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  ~Stack() { munmap(memory_, size_ + guard_); }
  stack_t area() const {
    stack_t area{};
    area.ss_sp = static_cast<char*>(memory_) + guard_;
    area.ss_size = size_;
    return area;
  }

 private:
  static constexpr size_t size_ = 128 * 1024, guard_ = 64 * 1024;
  void* memory_;
};

struct Fiber {
  Stack stack;
  ucontext_t start;
  jmp_buf context;
  bool started = false;
  State state = State::done;
  uint3 thread;
  Warp operation;
  unsigned mask;
  int source;
  bool flag;
  uint64_t value, result;
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  const std::function<void()>* body = nullptr;
  std::exception_ptr error;
  int flags = 0;  // of the barrier just passed
  alignas(128) std::array<char, shared_limit> arena;
  size_t dynamic_bytes = 0, used = 0;
  std::vector<std::pair<const void*, size_t>> arrays;
  uint64_t random = 0x9e3779b97f4a7c15u;

  int threads(const dim3& size) const { return static_cast<int>(size.x * size.y * size.z); }
  void prepare(int count);
  void run_block();
  void resume(Fiber& fiber);
  bool release_warps(int count);
  bool release_barrier(int count);
  std::vector<int64_t> order(int64_t count);
};

thread_local std::unique_ptr<Block> block;

void yield() {
  Block& b = *block;
  if (_setjmp(b.current->context) == 0) _longjmp(b.scheduler, 1);
}

// The life of a fiber: one thread after another.
void live() {
  for (;;) {
    Block& b = *block;
    try {
      (*b.body)();
    } catch (...) {
      b.error = std::current_exception();
    }
    b.current->state = State::done;
    yield();
  }
}

void Block::prepare(int count) {
  while (static_cast<int>(fibers.size()) < count) {
    auto fiber = std::make_unique<Fiber>();
    getcontext(&fiber->start);
    fiber->start.uc_stack = fiber->stack.area();
    fiber->start.uc_link = nullptr;
    makecontext(&fiber->start, live, 0);
    fibers.push_back(std::move(fiber));
  }
}

void Block::resume(Fiber& fiber) {
  current = &fiber;
  place.thread = fiber.thread;
  if (_setjmp(scheduler) != 0) return;
  if (std::exchange(fiber.started, true)) _longjmp(fiber.context, 1);
  setcontext(&fiber.start);
}

// Warp operations whose lanes have all come. A thread that has ended counts for nothing, as on the device.
bool Block::release_warps(int count) {
  bool released = false;
  for (int first = 0; first < count; first += 32) {
    const int lanes = std::min(32, count - first);
    for (int lane = 0; lane < lanes; ++lane) {
      Fiber& fiber = *fibers[first + lane];
      if (fiber.state != State::in_warp) continue;
      if (!(fiber.mask >> lane & 1)) throw std::logic_error("a lane calls a warp operation whose mask leaves it out");
      unsigned present = 0, set = 0;
      bool complete = true;
      for (int i = 0; i < lanes; ++i) {
        const Fiber& other = *fibers[first + i];
        if (!(fiber.mask >> i & 1) || other.state == State::done) continue;
        complete =
            complete && other.state == State::in_warp && other.mask == fiber.mask && other.operation == fiber.operation;
        present |= 1u << i;
        set |= (other.value != 0 ? 1u : 0u) << i;
      }
      if (!complete) continue;
      for (int i = 0; i < lanes; ++i) {
        if (!(present >> i & 1)) continue;
        Fiber& other = *fibers[first + i];
        const bool has_source = present >> other.source & 1;  // what another lane sends is undefined
        other.result =
            fiber.operation == Warp::ballot ? set : (has_source ? fibers[first + other.source]->value : ~uint64_t{0});
      }
      for (int i = 0; i < lanes; ++i) {
        if (present >> i & 1) fibers[first + i]->state = State::ready;
      }
      released = true;
    }
  }
  return released;
}

bool Block::release_barrier(int count) {
  int waiting = 0, done = 0;
  flags = 0;
  for (int t = 0; t < count; ++t) {
    waiting += fibers[t]->state == State::at_barrier;
    done += fibers[t]->state == State::done;
    flags += fibers[t]->state == State::at_barrier && fibers[t]->flag;
  }
  if (waiting == 0 || waiting + done < count) return false;
  for (int t = 0; t < count; ++t) {
    if (fibers[t]->state == State::at_barrier) fibers[t]->state = State::ready;
  }
  return true;
}

std::vector<int64_t> Block::order(int64_t count) {
  const char* setting = std::getenv("FASTMETA_EMULATION_ORDER");
  const std::string name = setting ? setting : "random";
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (name == "reverse") {
    std::reverse(order.begin(), order.end());
  } else if (name == "random") {
    for (int64_t i = count - 1; i > 0; --i) {
      random ^= random << 13;
      random ^= random >> 7;
      random ^= random << 17;
      std::swap(order[i], order[random % static_cast<uint64_t>(i + 1)]);
    }
  } else if (name != "forward") {
    throw std::invalid_argument("FASTMETA_EMULATION_ORDER must be forward, reverse or random, got " + name);
  }
  return order;
}

void Block::run_block() {
  const int count = threads(place.threads);
  used = dynamic_bytes;
  arrays.clear();
  std::memset(arena.data(), 0xff, dynamic_bytes);
  for (int t = 0; t < count; ++t) {
    fibers[t]->state = State::ready;
    fibers[t]->thread = {t % place.threads.x, t / place.threads.x % place.threads.y,
                         t / place.threads.x / place.threads.y};
  }
  const std::vector<int64_t> turns = order(count);
  do {
    for (const int64_t t : turns) {
      if (fibers[t]->state == State::ready) resume(*fibers[t]);
      if (error) std::rethrow_exception(error);
    }
  } while (release_warps(count) || release_barrier(count));
  for (int t = 0; t < count; ++t) {
    if (fibers[t]->state != State::done) {
      throw std::logic_error("threads of a block wait for others that never come to the barrier or warp operation");
    }
  }
}

}  // namespace

void run(dim3 blocks, dim3 threads, size_t shared_bytes, const std::function<void()>& body) {
  constexpr unsigned most = std::numeric_limits<int32_t>::max();
  if (blocks.x > most || blocks.y > 65535 || blocks.z > 65535) throw std::invalid_argument("a grid too large");
  if (threads.z > 64 || uint64_t{threads.x} * threads.y * threads.z - 1 >= 1024) {
    throw std::invalid_argument("a block must have 1 to 1024 threads");
  }
  if (shared_bytes > shared_limit) throw std::invalid_argument("more shared memory than every GPU has");
  if (!block) block = std::make_unique<Block>();
  block->body = &body;
  block->dynamic_bytes = (shared_bytes + 15) / 16 * 16;
  place = {{}, {}, threads, blocks};
  try {
    block->prepare(block->threads(threads));
    for (const int64_t b : block->order(int64_t{blocks.x} * blocks.y * blocks.z)) {
      place.block = {static_cast<unsigned>(b % blocks.x), static_cast<unsigned>(b / blocks.x % blocks.y),
                     static_cast<unsigned>(b / blocks.x / blocks.y)};
      block->run_block();
    }
  } catch (...) {
    block.reset();  // fibers are left in the middle of the kernel
    throw;
  }
}

int barrier(bool flag) {
  Fiber& self = *block->current;
  self.flag = flag;
  self.state = State::at_barrier;
  yield();
  return block->flags;
}

uint64_t warp(Warp operation, unsigned mask, uint64_t value, int source) {
  Fiber& self = *block->current;
  self.operation = operation;
  self.mask = mask;
  self.value = value;
  self.source = source % 32;
  self.state = State::in_warp;
  yield();
  return self.result;
}

void* shared(const void* key, size_t bytes) {
  Block& b = *block;
  for (const auto& [known, offset] : b.arrays) {
    if (known == key) return b.arena.data() + offset;
  }
  const size_t offset = b.used;
  b.used += (bytes + 15) / 16 * 16;
  if (b.used > shared_limit) throw std::invalid_argument("more shared memory than every GPU has");
  b.arrays.emplace_back(key, offset);
  std::memset(b.arena.data() + offset, 0xff, bytes);
  return b.arena.data() + offset;
}

void* dynamic_shared() { return block->arena.data(); }

}  // namespace fastmeta::emulator
