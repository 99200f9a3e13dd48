// SPDX-License-Identifier: Apache-2.0
// What emulation.h says: fibers, who waits for whom, shared memory and copies into it. A fiber is
// started by makecontext and left and resumed by setjmp and longjmp, which need no system call; it
// serves one block after another.
#include "emulation/emulation.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "emulation/shared.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace mxtrain::emulation {

uint32_t lane;

namespace {

constexpr size_t kStackBytes = size_t{128} << 10, kPageBytes = 4096;
constexpr uint64_t kGarbage8 = 0xDBDBDBDBDBDBDBDB;

struct Copy {
  uint8_t* to;
  const void* from;
  uint32_t size, bytes;
  unsigned group;
};

struct Fiber {
  unsigned index;
  bool started = false;  // within enter(), to be resumed by longjmp
  jmp_buf resume;
  ucontext_t start;
  const char *waits = nullptr, *file = nullptr;  // where it waits, or null
  int line = 0;
  uint32_t barrier = 0;  // whose phase it waits for
  bool left = false;     // has returned from the kernel
  std::vector<Copy> copies;
  unsigned group = 0;  // of the copies that it issues now
};

// Lanes that meet, by their mask.
struct Meeting {
  unsigned mask, arrived = 0;
  const char *what = nullptr, *file = nullptr;
  int line = 0;
  uint64_t in[32] = {}, out[32] = {};
};

std::mutex busy;  // one launch at a time
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<std::vector<Meeting>> warps;
std::vector<Fiber*> ready;
Fiber* self;
jmp_buf home;
unsigned threads, at_barrier, gone;
size_t dynamic_bytes;
void (*kernel)(const void*);
const void* kernel_context;
char message[1024];
cudaError_t last_error;
// 0: threads and blocks in turn; otherwise the seed, and above it 1 + a warp that runs only when no
// other can; -1: from the environment
int64_t order = -1;
uint64_t random_state;

uint64_t next_random() {  // Marsaglia's xorshift64
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  return random_state ^= random_state << 17;
}

// ---- fibers ----

void enter();

[[noreturn]] void resume(Fiber* f) {
  self = f;
  threadIdx = {f->index, 0, 0};
  lane = f->index % 32;
  if (f->started) _longjmp(f->resume, 1);
  f->started = true;
  setcontext(&f->start);
  abort();
}

void add_fiber() {
  auto f = std::make_unique<Fiber>();
  f->index = static_cast<unsigned>(fibers.size());
  void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED || mprotect(stack, kPageBytes, PROT_NONE) != 0) abort();
  f->start.uc_stack.ss_sp = stack;
  f->start.uc_stack.ss_size = kStackBytes;
  fibers.push_back(std::move(f));
}

void prepare(Fiber* f) {
  f->waits = nullptr;
  f->barrier = 0;
  f->left = false;
  f->copies.clear();
  if (f->started) return;
  const stack_t stack = f->start.uc_stack;
  getcontext(&f->start);
  f->start.uc_stack = stack;
  f->start.uc_link = nullptr;
  makecontext(&f->start, enter, 0);
}

[[noreturn]] void fail_stuck() {
  char text[700] = "";
  size_t used = 0;
  int shown = 0;
  for (unsigned i = 0; i < threads && shown < 4; ++i) {
    const Fiber& f = *fibers[i];
    const auto same = [&](const Fiber& g) {
      return g.waits != nullptr && g.line == f.line && strcmp(g.file, f.file) == 0;
    };
    if (f.waits == nullptr || (i > 0 && same(*fibers[i - 1]))) continue;
    unsigned last = i;
    while (last + 1 < threads && same(*fibers[last + 1])) ++last;
    used += snprintf(text + used, sizeof text - used, "%s threads %u to %u at %s (%s:%d)",
                     shown++ ? "," : "", i, last, f.waits, f.file, f.line);
    used = std::min(used, sizeof text - 1);
  }
  fail(
      "threads wait for others that cannot come, in block %u, %u:%s; %u of %u have left the kernel",
      blockIdx.x, blockIdx.y, text, gone, threads);
}

Fiber* next() {
  if (ready.empty()) fail_stuck();
  size_t i = order == 0 ? 0 : next_random() % ready.size();
  const unsigned last_warp = static_cast<unsigned>(order >> 32) - 1;
  for (size_t tries = 0; tries < ready.size() && ready[i]->index / 32 == last_warp; ++tries)
    i = (i + 1) % ready.size();
  Fiber* f = ready[i];
  if (order == 0) {
    ready.erase(ready.begin());
  } else {
    ready[i] = ready.back();
    ready.pop_back();
  }
  return f;
}

void release(Fiber* f) {
  f->waits = nullptr;
  ready.push_back(f);
}

// Until someone releases it.
void wait(const char* what, const char* file, int line) {
  self->waits = what;
  self->file = file;
  self->line = line;
  if (_setjmp(self->resume) == 0) resume(next());
}

void enter() {
  for (;;) {
    kernel(kernel_context);
    self->left = true;
    if (++gone == threads) {
      if (_setjmp(self->resume) == 0) _longjmp(home, 1);
    } else if (_setjmp(self->resume) == 0) {
      resume(next());
    }
  }
}

// ---- shared memory ----

uint8_t*
shared_base() {  // a kernel may exchange bits of an address: the low ones are the real ones
  return shared_first - reinterpret_cast<uintptr_t>(shared_first) % 65536 - (1 << 30);
}

bool is_shared(const uint8_t* p, size_t bytes) {
  return p >= shared_first && p + bytes <= shared_last &&
         (p + bytes <= shared_first + dynamic_bytes || p >= shared_first + kMostShared);
}

struct Range {
  uint8_t *begin, *end;
};

__attribute__((no_sanitize("address"))) void fill(Range r) {
  for (uint8_t* p = r.begin; p < r.end; p += 8)
    *reinterpret_cast<volatile uint64_t*>(p) = kGarbage8;
}

// What the kernel has written, as one range.
__attribute__((no_sanitize("address"))) Range written() {
  const auto is_garbage = [](const uint8_t* p) __attribute__((no_sanitize("address"))) {
    return *reinterpret_cast<const volatile uint64_t*>(p) == kGarbage8;
  };
  Range r = {shared_first, shared_last};
  while (r.begin < r.end && is_garbage(r.begin)) r.begin += 8;
  while (r.begin < r.end && is_garbage(r.end - 8)) r.end -= 8;
  return r;
}

void make(const Copy& c) {
  memcpy(c.to, c.from, c.bytes);
  memset(c.to + c.bytes, 0, c.size - c.bytes);
}

// Whether the block came to its end.
bool run_block() {
  ready.clear();
  for (auto& warp : warps) warp.clear();
  at_barrier = gone = 0;
  for (unsigned i = 0; i < threads; ++i) {
    prepare(fibers[i].get());
    ready.push_back(fibers[i].get());
  }
  const int how = _setjmp(home);
  if (how == 0) resume(next());
  if (how == 2)  // they stand somewhere in the kernel, and are begun anew
    for (auto& f : fibers) f->started = false;
  return how == 1;
}

}  // namespace

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  _longjmp(home, 2);
}

bool draw() { return order != 0 && next_random() % 2 != 0; }

void barrier(const char* what, const char* file, int line) {
  if (at_barrier != 0)
    for (unsigned i = 0; i < threads; ++i) {
      const Fiber& f = *fibers[i];
      if (f.waits != what) continue;
      if (f.line != line || strcmp(f.file, file) != 0)
        fail("threads %u and %u of a block are at different barriers: %s:%d and %s:%d", i,
             self->index, f.file, f.line, file, line);
      break;
    }
  if (++at_barrier < threads) return wait(what, file, line);
  at_barrier = 0;
  for (unsigned i = 0; i < threads; ++i)
    if (fibers[i].get() != self) release(fibers[i].get());
}

const uint64_t* exchange(const char* what, unsigned mask, uint64_t value, const char* file,
                         int line) {
  auto& warp = warps[self->index / 32];
  if (!(mask >> lane & 1))
    fail("lane %u is not in the mask %08x of its %s (%s:%d)", lane, mask, what, file, line);
  auto it =
      std::find_if(warp.begin(), warp.end(), [&](const Meeting& m) { return m.mask == mask; });
  if (it == warp.end()) it = warp.insert(warp.end(), Meeting{mask});
  const size_t at = it - warp.begin();
  if (it->arrived == 0) {
    it->what = what, it->file = file, it->line = line;
  } else if (it->line != line || strcmp(it->what, what) != 0 || strcmp(it->file, file) != 0) {
    fail("lanes of warp %u meet in %s (%s:%d) and %s (%s:%d)", self->index / 32, it->what, it->file,
         it->line, what, file, line);
  }
  it->arrived |= 1u << lane;
  it->in[lane] = value;
  const unsigned first = self->index - lane;
  const unsigned there = threads - first < 32 ? (1u << (threads - first)) - 1 : 0xFFFFFFFFu;
  if (it->arrived != (mask & there)) {
    wait(what, file, line);
    return warp[at].out;
  }
  it->arrived = 0;
  memcpy(it->out, it->in, sizeof it->out);
  for (unsigned i = 0; i < 32; ++i)
    if ((mask & there) >> i & 1 && i != lane) release(fibers[first + i].get());
  return it->out;
}

uint8_t* dynamic_shared() { return shared_first; }

struct Phases {
  uint16_t arrivals, left;
  uint32_t ended;
};

static Phases* phases_at(uint32_t barrier) {
  return static_cast<Phases*>(at_shared(barrier, sizeof(Phases)));
}

void init_phases(uint32_t barrier, uint32_t arrivals) {
  *phases_at(barrier) = {static_cast<uint16_t>(arrivals), static_cast<uint16_t>(arrivals), 0};
}

void arrive(uint32_t barrier) {
  Phases& p = *phases_at(barrier);
  if (p.left == 0 || p.left > p.arrivals) fail("an mbarrier is arrived at and was not initialized");
  if (--p.left > 0) return;
  p.left = p.arrivals;
  ++p.ended;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& f = *fibers[i];
    if (f.waits == nullptr || f.barrier != barrier) continue;
    f.barrier = 0;
    release(&f);
  }
}

void await_phase(uint32_t barrier, uint32_t parity, const char* what, const char* file, int line) {
  while (phases_at(barrier)->ended % 2 == parity) {
    self->barrier = barrier;
    wait(what, file, line);
  }
}

uint32_t shared_address(const void* p) {
  const auto* at = static_cast<const uint8_t*>(p);
  if (!is_shared(at, 0)) fail("an address is used as one of shared memory, and is none");
  return static_cast<uint32_t>(at - shared_base());
}

void* at_shared(uint32_t address, uint32_t bytes) {
  uint8_t* p = shared_base() + address;
  if (!is_shared(p, bytes)) fail("%u bytes are not within shared memory", bytes);
  if (address % bytes != 0) fail("%u bytes in shared memory are not aligned", bytes);
  return p;
}

void copy_async(uint32_t to, const void* from, uint32_t size, uint32_t bytes) {
  if (bytes > size) fail("cp.async of %u bytes is asked for %u", size, bytes);
  if (reinterpret_cast<uintptr_t>(from) % size != 0)
    fail("cp.async of %u bytes is not aligned", size);
  const Copy c = {static_cast<uint8_t*>(at_shared(to, size)), from, size, bytes, self->group};
  if (draw()) return make(c);
  self->copies.push_back(c);
}

void commit_copies() { ++self->group; }

void await_copies(unsigned pending) {
  auto& copies = self->copies;
  const auto is_due = [&](const Copy& c) { return self->group - c.group > pending; };
  for (const Copy& c : copies)
    if (is_due(c)) make(c);
  copies.erase(std::remove_if(copies.begin(), copies.end(), is_due), copies.end());
}

void await_all_copies() {
  for (const Copy& c : self->copies) make(c);
  self->copies.clear();
}

void run(void (*body)(const void*), const void* context, dim3 grid, unsigned block, size_t shared) {
  const std::lock_guard<std::mutex> guard(busy);
  if (order < 0) {
    const char* asked = getenv("MXTRAIN_EMULATION_ORDER");
    order = asked == nullptr ? 1 : strtoll(asked, nullptr, 10);
  }
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  if (blocks == 0 || block == 0 || block > 1024 || shared > kMostShared || grid.y > 65535 ||
      grid.z > 65535) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  kernel = body, kernel_context = context;
  threads = block, dynamic_bytes = shared;
  gridDim = grid, blockDim = dim3(block);
  random_state = static_cast<uint64_t>(order) * 0x9E3779B97F4A7C15;
  while (fibers.size() < threads) add_fiber();
  warps.resize((threads + 31) / 32);
  std::vector<uint32_t> turn(blocks);
  for (size_t i = 0; i < blocks; ++i) turn[i] = static_cast<uint32_t>(i);
  for (size_t i = blocks; order != 0 && i > 1; --i) std::swap(turn[i - 1], turn[next_random() % i]);
  fill({shared_first, shared_last});
  Range used = {};
  for (size_t i = 0; i < blocks; ++i) {
    blockIdx = {turn[i] % grid.x, turn[i] / grid.x % grid.y, turn[i] / grid.x / grid.y};
    if (i > 0) fill(used);
    if (!run_block()) {
      last_error = cudaErrorLaunchFailure;
      return;
    }
    if (i == 0) used = written();
  }
}

}  // namespace mxtrain::emulation

cudaError_t cudaGetLastError() {
  const cudaError_t error = mxtrain::emulation::last_error;
  mxtrain::emulation::last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "cudaErrorLaunchFailure" : "an error of the emulation";
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? mxtrain::emulation::message : "";
}

// Not an op: 0 for threads and blocks in turn, otherwise the seed of their order.
extern "C" __attribute__((visibility("default"))) void mxtrain_emulation_set_order(int64_t seed) {
  mxtrain::emulation::order = seed;
}
