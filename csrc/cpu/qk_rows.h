// What the dispatcher (qk.cpp) hands to a CPU variant (qk_mse.cpp, qk_kl.cpp): heads of queries and keys.
#pragma once
#include "cpu/element.h"

namespace kdfast {

// What all heads of a call share.
struct QkShape {
  Element student, teacher;
  int64_t length, student_size, teacher_size;  // tokens; numbers of a head's token
  double student_scale, teacher_scale;
  bool causal;
};

// Tokens of a head: steps between tokens and between numbers, in elements.
struct QkTokens {
  const void* data;
  int64_t token, number;
};

struct QkHead {
  QkTokens student_q, student_k, teacher_q, teacher_k;
  const bool *queries, *keys;  // that count; null: all
  void* student_dq;            // contiguous tokens; null: no gradients wanted
  void* student_dk;            // sums of the heads that share the keys, of key_sums() each
  double factor;               // of the gradients
  double value;                // a result
};

// The kernels of one loss. Memory is given to them: they have none of their own.
struct QkKernels {
  int64_t (*workspace)(const QkShape&);  // bytes
  int64_t (*key_sums)(const QkShape&);   // bytes of QkHead::student_dk
  void (*head)(const QkShape&, QkHead&, char* workspace);
  void (*write_keys)(const QkShape&, const void* sums, void* to);
};

}  // namespace kdfast
