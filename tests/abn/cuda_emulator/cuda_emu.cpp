// The engine of cuda_emu.h: fibers, schedule, barriers, shuffles, checks.
// Always compiled without sanitizers; -DEMU_ASAN and -DEMU_TSAN tell it about theirs.
#include "cuda_emu.h"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim
#include <link.h>
#include <sys/mman.h>
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <mutex>
#include <thread>
#include <vector>
#if defined(EMU_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(EMU_TSAN)
#include <sanitizer/tsan_interface.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emu {
View V;
struct Fiber {
  char* stack;
  size_t size;
  void *sp, *fake, *tsan;
#if !defined(__x86_64__)
  ucontext_t uc;
#endif
};
namespace {
constexpr size_t STACK = 256 << 10;
std::mutex lock;
std::vector<Thread> threads;
std::vector<Fiber*> pool;  // idle fibers
Fiber host;
void (*entry)(void**);
void** args;
char error[512];
bool failed;
int order;  // 0 forward, 1 backward, >1 seed of a shuffle
uint64_t rng;

void fail(const Thread* t, const char* format, ...) {
  if (failed) return;
  failed = true;
  char message[400];
  va_list ap;
  va_start(ap, format);
  vsnprintf(message, sizeof message, format, ap);
  va_end(ap);
  if (!t) snprintf(error, sizeof error, "%s", message);
  else
    snprintf(error, sizeof error, "block (%u,%u,%u) thread (%u,%u,%u): %s", V.bid.x, V.bid.y, V.bid.z, t->tid.x,
             t->tid.y, t->tid.z, message);
}

// Happens-before edges that ThreadSanitizer is told of; nothing else orders fibers.
// A thread may reach its next barrier before another has left this one: two by turns.
// Each block has its own, or one block's barrier would order another's threads.
struct Edges { char barrier[2]; };
char launch_edge, end_edge;
std::vector<Edges> edges(1);
Edges* edge;
unsigned barriers;
#if defined(EMU_TSAN)
void release(void* a) { __tsan_release(a); }
void acquire(void* a) { __tsan_acquire(a); }
#else
void release(void*) {}
void acquire(void*) {}
#endif

// ---- fibers
#if defined(__x86_64__)
extern "C" void emu_switch(void** save, void* load);
asm(R"(
.text
.type emu_switch,@function
emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size emu_switch,.-emu_switch
)");
#endif
void jump(Fiber* from, Fiber* to) {
#if defined(EMU_TSAN)
  __tsan_switch_to_fiber(to->tsan, 1);  // 1: the switch itself orders nothing
#endif
#if defined(EMU_ASAN)
  __sanitizer_start_switch_fiber(&from->fake, to->stack, to->size);
#endif
#if defined(__x86_64__)
  emu_switch(&from->sp, to->sp);
#else
  swapcontext(&from->uc, &to->uc);
#endif
#if defined(EMU_ASAN)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(from->fake, &bottom, &size);
  if (from != &host) host.stack = (char*)bottom, host.size = size;
#endif
}
void body() {
#if defined(EMU_ASAN)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  host.stack = (char*)bottom, host.size = size;
#endif
  for (;;) {
    acquire(&launch_edge);
    entry(args);
    release(&end_edge);
    V.cur->state = DONE;
    jump(V.cur->fiber, &host);  // the fiber stays, to run another thread
  }
}
Fiber* make_fiber() {
  Fiber* f = new Fiber{};
  f->size = STACK;
  f->stack = (char*)mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  mprotect(f->stack, 4096, PROT_NONE);
#if defined(__x86_64__)
  void** top = (void**)(f->stack + STACK - 64);
  *--top = nullptr;
  *--top = (void*)&body;
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f->sp = top;
#else
  getcontext(&f->uc);
  f->uc.uc_stack.ss_sp = f->stack, f->uc.uc_stack.ss_size = STACK;
  makecontext(&f->uc, body, 0);
#endif
#if defined(EMU_TSAN)
  f->tsan = __tsan_create_fiber(0);
#endif
  return f;
}
void resume(Thread& t) {
  if (!t.fiber) {
    if (pool.empty()) pool.push_back(make_fiber());
    t.fiber = pool.back();
    pool.pop_back();
  }
  V.cur = &t;
  jump(&host, t.fiber);
#if !defined(EMU_TSAN)  // there, each CUDA thread has an identity of its own
  if (t.state == DONE) pool.push_back(t.fiber), t.fiber = nullptr;
#endif
}
void park(State s, const char* site) {
  V.cur->state = s;
  V.cur->site = site;
  jump(V.cur->fiber, &host);
}

// ---- schedule
uint64_t random_bits() {
  rng ^= rng << 13, rng ^= rng >> 7, rng ^= rng << 17;
  return rng;
}
template <typename I> void make_order(std::vector<I>& o) {
  const I n = (I)o.size();
  for (I i = 0; i < n; ++i) o[i] = order == 1 ? n - 1 - i : i;
  if (order > 1)
    for (I i = n - 1; i > 0; --i) std::swap(o[i], o[random_bits() % (i + 1)]);
}
// Completes the warp's shuffles whose lanes have all arrived.
bool release_warp(int first, int last) {
  bool any = false;
  for (int i = first; i < last; ++i) {
    Thread& t = threads[i];
    if (t.state != AT_SHUFFLE) continue;
    if (last - first < 32 && t.mask >> (last - first)) {
      fail(&t, "%s: mask %08x names lanes that the block does not have", t.site, t.mask);
      return false;
    }
    bool all = true;
    for (int j = first; j < last && all; ++j) {
      Thread& u = threads[j];
      if (!(t.mask >> u.lane & 1)) continue;
      if (u.state == DONE) {
        fail(&t, "%s: mask %08x names lane %u, which has returned", t.site, t.mask, u.lane);
        return false;
      }
      if (u.state != AT_SHUFFLE) all = false;
      else if (u.mask != t.mask || strcmp(u.site, t.site)) {
        fail(&u, "lanes of one mask meet different shuffles: %s (mask %08x), %s (mask %08x)", t.site, t.mask, u.site,
             u.mask);
        return false;
      }
    }
    if (!all) continue;
    const unsigned mask = t.mask;
    for (int j = first; j < last; ++j) {
      Thread& u = threads[j];
      if (!(mask >> u.lane & 1)) continue;
      if (!(mask >> u.source & 1)) {
        fail(&u, "%s: reads lane %d, which is not in mask %08x", u.site, u.source, mask);
        return false;
      }
      u.out = threads[first + u.source].in;
      u.state = READY;
    }
    any = true;
  }
  return any;
}
void run_block(std::vector<int>& o) {
  const int n = (int)threads.size();
  for (;;) {
    bool ran = false;
    make_order(o);
    for (int k : o)
      if (threads[k].state == READY) {
        ran = true;
        resume(threads[k]);
        if (failed) return;
      }
    for (int w = 0; w < n; w += 32) ran |= release_warp(w, std::min(w + 32, n));
    if (failed) return;
    if (ran) continue;
    const Thread *waiting = nullptr, *gone = nullptr, *stuck = nullptr;
    for (const Thread& t : threads) {
      if (t.state == DONE) gone = &t;
      if (t.state == AT_SHUFFLE) stuck = &t;
      if (t.state != AT_BARRIER) continue;
      if (waiting && strcmp(waiting->site, t.site))
        return fail(&t, "threads of one block wait at different barriers: %s, %s", waiting->site, t.site);
      waiting = &t;
    }
    if (stuck)
      return fail(stuck, "deadlock: %s waits for lanes that wait at %s", stuck->site,
                  waiting ? waiting->site : "another shuffle");
    if (!waiting) return;  // all done
    if (gone) return fail(gone, "this thread returned while others wait at %s", waiting->site);
    for (Thread& t : threads) t.state = READY;
    ++barriers;
  }
}
// Shared memory starts as whatever an earlier block left: here always NaN and -1.
int poison_tls(dl_phdr_info* i, size_t, void* self) {
  bool mine = false;
  for (int k = 0; k < i->dlpi_phnum; ++k) {
    const uintptr_t low = i->dlpi_addr + i->dlpi_phdr[k].p_vaddr;
    mine |= i->dlpi_phdr[k].p_type == PT_LOAD && (uintptr_t)self >= low &&
            (uintptr_t)self < low + i->dlpi_phdr[k].p_memsz;
  }
  if (mine)
    for (int k = 0; k < i->dlpi_phnum; ++k)
      if (i->dlpi_phdr[k].p_type == PT_TLS && i->dlpi_tls_data) memset(i->dlpi_tls_data, 0xff, i->dlpi_phdr[k].p_memsz);
  return mine;
}

// ---- traffic
struct Range {
  uintptr_t begin, end;
  unsigned long long loaded, stored, accesses;
};
std::vector<Range> watched;
}  // namespace

void barrier(const char* site) {
  char* e = &edge->barrier[barriers & 1];
  release(e);
  park(AT_BARRIER, site);
  acquire(e);
}
void shuffle(unsigned mask, uint64_t in, int source, const char* site) {
  Thread& t = *V.cur;
  if (!(mask >> t.lane & 1)) fail(&t, "%s: the calling lane %u is not in mask %08x", site, t.lane, mask);
  t.mask = mask, t.in = in, t.source = source;
  park(AT_SHUFFLE, site);
}
void trap(const char* site) {
  fail(V.cur, "%s", site);
  park(DONE, site);
}
void count(uintptr_t at, unsigned bytes, bool stored) {
  for (Range& r : watched)
    if (at >= r.begin && at < r.end) (stored ? r.stored : r.loaded) += bytes, ++r.accesses;
}

#if defined(EMU_TSAN)
std::vector<Fiber*> spent;
void retire() {
  for (Fiber* f : spent) {
    __tsan_destroy_fiber(f->tsan);
    munmap(f->stack, f->size);
    delete f;
  }
  spent.clear();
}
#endif
int launch(void (*kernel)(void**), void** a, const int* d, int how, long long only) {
  std::lock_guard<std::mutex> hold(lock);
  entry = kernel, args = a, failed = false, error[0] = 0, order = how;
  rng = 0x9e3779b97f4a7c15ull * (uint64_t)(how + 1);
  V.grid = uint3{(unsigned)d[0], (unsigned)d[1], (unsigned)d[2]};
  V.block = uint3{(unsigned)d[3], (unsigned)d[4], (unsigned)d[5]};
  const long long per_block = (long long)d[3] * d[4] * d[5], count = (long long)d[0] * d[1] * d[2];
  if (per_block < 1 || per_block > 1024 || count < 1 || d[1] > 65535 || d[2] > 65535 || d[5] > 64) {
    fail(nullptr, "launch configuration that no device takes");
    return 1;
  }
  std::vector<long long> blocks(only >= 0 ? 1 : count, only);
  std::vector<int> o(per_block);
  if (only < 0) make_order(blocks);
#if defined(EMU_TSAN)
  if ((long long)edges.size() < count) edges.resize(count);
#endif
  release(&launch_edge);
  for (long long b : blocks) {
    V.bid = uint3{(unsigned)(b % V.grid.x), (unsigned)(b / V.grid.x % V.grid.y), (unsigned)(b / V.grid.x / V.grid.y)};
    threads.assign(per_block, Thread{});
    edge = &edges[b < (long long)edges.size() ? b : 0];
    for (int i = 0; i < (int)per_block; ++i) {
      Thread& t = threads[i];
      t.tid = uint3{i % V.block.x, i / V.block.x % V.block.y, i / V.block.x / V.block.y};
      t.lane = i & 31, t.warp = i >> 5;
    }
    auto run = [&] {
      static thread_local volatile char touch;
      touch = 0;  // allocates the TLS image
#if !defined(EMU_ASAN)
      dl_iterate_phdr(poison_tls, (void*)&poison_tls);
#endif
      run_block(o);
    };
#if defined(EMU_TSAN)
    // A new OS thread for fresh shared memory, new fibers for threads that nothing orders after those of earlier
    // blocks: races between blocks show as well.
    std::thread([&] {
      host.tsan = __tsan_get_current_fiber();
      release(&launch_edge);
      run();
    }).join();
    for (Thread& t : threads)
      if (t.fiber) spent.push_back(t.fiber);
    if (spent.size() > 1000 || failed) retire();
#else
    run();
#endif
    V.cur = nullptr;
    if (failed) return 1;  // the stacks of stuck fibers are given up
  }
#if defined(EMU_TSAN)
  retire();
#endif
  acquire(&end_edge);
  return 0;
}
extern "C" const char* emu_error() { return error; }
// Counts the global accesses that fall into these n ranges of bytes, from 0; then reads the counts.
extern "C" void emu_watch(int n, const uint64_t* begins, const uint64_t* sizes) {
  watched.clear();
  for (int i = 0; i < n; ++i) watched.push_back(Range{begins[i], begins[i] + sizes[i], 0, 0, 0});
}
extern "C" void emu_traffic(unsigned long long* out) {
  for (const Range& r : watched) *out++ = r.loaded, *out++ = r.stored, *out++ = r.accesses;
}
}  // namespace emu
