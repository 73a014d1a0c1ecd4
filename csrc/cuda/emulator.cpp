// Runs the threads of an emulated block on the CPU: a fiber each, resumed in turn.
//
// FASTMETA_EMULATION_ORDER is `forward`, `reverse` or `random` (the default; the same in every run of a program): the
// order of the blocks, and of the threads between two barriers; at random, some warps also go
// ahead of others as far as they can. A kernel that lacks a barrier gives another result in another order, or reads the
// poison that shared memory starts with.
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

enum class State { ready, at_barrier, at_grid_barrier, in_warp, done };

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
  size_t used = 0, most = 0;  // of the arena
  std::vector<std::pair<const void*, size_t>> arrays;
  uint3 number;                // its place in the grid
  std::vector<int64_t> turns;  // its threads, in the order in which they run

  void start(const uint3& number, const Launch& launch, const std::function<void()>& body);
  // Until every thread has ended or waits for other blocks: whether one waits.
  bool run();
  void pass_grid_barrier();
  void resume(Fiber& fiber);
  bool release_warps(int count);
  bool release_barrier(int count);
};

thread_local std::vector<std::unique_ptr<Block>> living;
thread_local Block* block = nullptr;  // whose threads run
thread_local uint64_t random_bits = 0x9e3779b97f4a7c15u;

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

uint64_t draw() {
  random_bits ^= random_bits << 13;
  random_bits ^= random_bits >> 7;
  random_bits ^= random_bits << 17;
  return random_bits;
}

std::string order_name() {
  const char* setting = std::getenv("FASTMETA_EMULATION_ORDER");
  return setting ? setting : "random";
}

std::vector<int64_t> in_order(int64_t count) {
  const std::string name = order_name();
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (name == "reverse") {
    std::reverse(order.begin(), order.end());
  } else if (name == "random") {
    for (int64_t i = count - 1; i > 0; --i) std::swap(order[i], order[draw() % static_cast<uint64_t>(i + 1)]);
  } else if (name != "forward") {
    throw std::invalid_argument("FASTMETA_EMULATION_ORDER must be forward, reverse or random, got " + name);
  }
  return order;
}

void Block::start(const uint3& at, const Launch& launch, const std::function<void()>& kernel) {
  const dim3& size = launch.threads;
  const size_t count = size_t{size.x} * size.y * size.z;
  while (fibers.size() < count) {
    auto fiber = std::make_unique<Fiber>();
    getcontext(&fiber->start);
    fiber->start.uc_stack = fiber->stack.area();
    fiber->start.uc_link = nullptr;
    makecontext(&fiber->start, live, 0);
    fibers.push_back(std::move(fiber));
  }
  number = at;
  body = &kernel;
  used = (launch.shared_bytes + 15) / 16 * 16;
  most = launch.shared_most;
  arrays.clear();
  std::memset(arena.data(), 0xff, used);
  for (unsigned t = 0; t < count; ++t) {
    fibers[t]->state = State::ready;
    fibers[t]->thread = {t % size.x, t / size.x % size.y, t / size.x / size.y};
  }
  turns = in_order(static_cast<int64_t>(count));
}

bool Block::run() {
  const int count = static_cast<int>(turns.size());
  block = this;
  place.block = number;
  const bool at_random = order_name() == "random";
  uint64_t left = at_random ? draw() : 0;  // warps that stay behind, until all others wait for them
  for (;;) {
    bool leaves_some = false;
    for (const int64_t t : turns) {
      if (fibers[t]->state != State::ready) continue;
      if (left >> (t / 32) & 1) {
        leaves_some = true;
        continue;
      }
      resume(*fibers[t]);
      if (error) std::rethrow_exception(error);
    }
    if (release_warps(count)) continue;
    if (leaves_some) {
      left = 0;
      continue;
    }
    if (!release_barrier(count)) break;
    left = at_random ? draw() : 0;
  }
  bool waits = false, is_stuck = false;
  for (int t = 0; t < count; ++t) {
    waits = waits || fibers[t]->state == State::at_grid_barrier;
    is_stuck = is_stuck || fibers[t]->state == State::at_barrier || fibers[t]->state == State::in_warp;
  }
  for (int t = 0; t < count; ++t) is_stuck = is_stuck || (waits && fibers[t]->state == State::done);
  if (is_stuck) {
    throw std::logic_error("threads of a block wait for others that never come to the barrier or warp operation");
  }
  return waits;
}

void Block::pass_grid_barrier() {
  for (const int64_t t : turns) fibers[t]->state = State::ready;
}

// The blocks of a cooperative launch, each from one barrier of the grid to the next.
void run_together(int64_t count) {
  for (int64_t waiting = count; waiting > 0;) {
    waiting = 0;
    for (const int64_t b : in_order(count)) waiting += living[b]->run();
    if (waiting % count != 0) throw std::logic_error("blocks wait at the grid's barrier for others that have ended");
    for (int64_t b = 0; b < waiting; ++b) living[b]->pass_grid_barrier();
  }
}

}  // namespace

void run(const Launch& launch, const std::function<void()>& body) {
  const dim3 &blocks = launch.blocks, &threads = launch.threads;
  constexpr unsigned most = std::numeric_limits<int32_t>::max();
  if (blocks.x > most || blocks.y > 65535 || blocks.z > 65535) throw std::invalid_argument("a grid too large");
  const uint64_t block_threads = uint64_t{threads.x} * threads.y * threads.z;
  if (threads.z > 64 || block_threads - 1 >= 1024) throw std::invalid_argument("a block must have 1 to 1024 threads");
  if (launch.shared_bytes > shared_limit) throw std::invalid_argument("more shared memory than every GPU has");
  const uint64_t count = uint64_t{blocks.x} * blocks.y * blocks.z;
  const uint64_t resident = std::min(2048 / block_threads, shared_limit / std::max<size_t>(1, launch.shared_bytes));
  if (launch.cooperative && count > multiprocessors * resident) {
    throw std::invalid_argument("more blocks than are resident at once in a cooperative launch");
  }
  const auto number = [&](uint64_t b) {
    return uint3{static_cast<unsigned>(b % blocks.x), static_cast<unsigned>(b / blocks.x % blocks.y),
                 static_cast<unsigned>(b / blocks.x / blocks.y)};
  };
  place = {{}, {}, threads, blocks};
  try {
    while (living.size() < (launch.cooperative ? count : 1)) living.push_back(std::make_unique<Block>());
    if (launch.cooperative) {
      for (uint64_t b = 0; b < count; ++b) living[b]->start(number(b), launch, body);
      run_together(static_cast<int64_t>(count));
    } else {
      for (const int64_t b : in_order(static_cast<int64_t>(count))) {
        living[0]->start(number(b), launch, body);
        if (living[0]->run()) throw std::logic_error("a barrier of the grid in a launch that is not cooperative");
      }
    }
  } catch (...) {
    living.clear();  // fibers are left in the middle of the kernel
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

void grid_barrier() {
  block->current->state = State::at_grid_barrier;
  yield();
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
  if (b.used > b.most) throw std::invalid_argument("more shared memory than a launch has, or than it has asked for");
  b.arrays.emplace_back(key, offset);
  std::memset(b.arena.data() + offset, 0xff, bytes);
  return b.arena.data() + offset;
}

void* dynamic_shared() { return block->arena.data(); }

}  // namespace fastmeta::emulator
