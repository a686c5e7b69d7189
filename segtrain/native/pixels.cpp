// The loops over pixels that take most time of an evaluation: a plain C library, which pixels.py compiles at first use.
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <algorithm>
#include <vector>

#ifdef JOINT_HISTOGRAM
// counts[a * 256 + b] += 1 for every pair. Labels come in runs, so eight equal pairs in a row cost one addition. Others
// go to four tables in turn, because the second of two successive additions to one cell would wait for the first.
extern "C" void joint_histogram(const uint8_t* a, const uint8_t* b, long n, int64_t* counts) {
  static thread_local std::vector<uint32_t> tables(4 << 16);
  const long most = 1l << 31;
  while (n > 0) {
    const long now = std::min(n, most);
    std::fill(tables.begin(), tables.end(), 0);
    uint32_t* t = tables.data();
    long i = 0;
    for (; i + 8 <= now; i += 8) {
      uint64_t x, y;
      memcpy(&x, a + i, 8);
      memcpy(&y, b + i, 8);
      const uint64_t ones = 0x0101010101010101ull;
      if (x == ones * a[i] && y == ones * b[i]) {
        t[a[i] << 8 | b[i]] += 8;
        continue;
      }
      for (int k = 0; k < 8; k++) t[(k & 3) << 16 | a[i + k] << 8 | b[i + k]]++;
    }
    for (; i < now; i++) t[a[i] << 8 | b[i]]++;
    for (long c = 0; c < 1 << 16; c++) counts[c] += int64_t(t[c]) + t[c + (1 << 16)] + t[c + (2 << 16)] + t[c + (3 << 16)];
    a += now;
    b += now;
    n -= now;
  }
}

#endif

#ifdef UPSAMPLED_ARGMAX
namespace {

const int LANES = 8;

// Position of an output pixel between two input pixels, with half-pixel centres, clamped at the edges.
struct Place {
  int first, second;
  float weight;  // of the second
};

std::vector<Place> places(int from, int to) {
  std::vector<Place> result(to);
  const double scale = double(from) / to;
  for (int i = 0; i < to; i++) {
    const double at = std::max(0.0, (i + 0.5) * scale - 0.5);
    const int first = std::min(int(at), from - 1);
    result[i] = {first, std::min(first + 1, from - 1), float(at - first)};
  }
  return result;
}

}  // namespace

// out[y - top, x] = the channel with the highest value of logits, enlarged bilinearly to (height, width), of the rows
// top to bottom - 1; the first of equal ones. Of the `cells` rows of logits, (channels, h, w) are those from `first` on.
// The rows are divided among threads.
extern "C" void upsampled_argmax(
    const float* logits, int channels, int h, int w, int height, int width, uint8_t* out, int threads, int top,
    int bottom, int first, int cells) {
  const std::vector<Place> rows = places(cells, height), columns = places(w, width);
  // Runs of at most LANES output pixels that lie between the same two input pixels.
  struct Run {
    int start, length;
  };
  std::vector<Run> runs;
  for (int x = 0; x < width;) {
    int end = x + 1;
    while (end < width && end < x + LANES && columns[end].first == columns[x].first) end++;
    runs.push_back({x, end - x});
    x = end;
  }
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> blended(size_t(channels) * w);  // (w, channels): what a run reads is contiguous
#pragma omp for schedule(static)
    for (int y = top; y < bottom; y++) {
      const Place& row = rows[y];
      const float down = row.weight, up = 1 - down;
      for (int c = 0; c < channels; c++) {
        const float* upper = logits + (size_t(c) * h + row.first - first) * w;
        const float* lower = logits + (size_t(c) * h + row.second - first) * w;
        for (int x = 0; x < w; x++) blended[size_t(x) * channels + c] = up * upper[x] + down * lower[x];
      }
      for (const Run& run : runs) {
        const Place& place = columns[run.start];
        const float* left = blended.data() + size_t(place.first) * channels;
        const float* right = blended.data() + size_t(place.second) * channels;
        float weight[LANES], best[LANES];
        int32_t found[LANES];
        for (int k = 0; k < LANES; k++) {
          weight[k] = columns[std::min(run.start + k, width - 1)].weight;
          best[k] = -INFINITY;
          found[k] = 0;
        }
        for (int c = 0; c < channels; c++) {
          const float from = left[c], step = right[c] - from;
#pragma omp simd
          for (int k = 0; k < LANES; k++) {
            const float value = from + weight[k] * step;
            found[k] = value > best[k] ? c : found[k];
            best[k] = value > best[k] ? value : best[k];
          }
        }
        for (int k = 0; k < run.length; k++) out[size_t(y - top) * width + run.start + k] = uint8_t(found[k]);
      }
    }
  }
}
#endif
