//! A CUDA driver for machines without a GPU: what the library's CUDA backend asks of `libcuda.so.1`, with a device whose
//! kernels are executed on the CPU, from the PTX that a driver would get.
//!
//! It is there to find mistakes, not to be fast. Work that is enqueued waits until somebody waits for it, and is then done in
//! an order that chance picks among those that streams, events and the edges of graphs allow; copies arrive as late as they
//! may; every access of memory is checked. A kernel that does what it may not is reported with its line, and is the
//! device's end, as on a device.
//!
//! What it does not show: time, caches, races between the threads of a warp, or of a block but where the order of warps brings them
//! out (`compute-sanitizer` finds them, where there is a device), and how a device rounds the sums of its tensor cores (here:
//! floats, in the order of the depth).
//!
//! | variable | what it says |
//! |---|---|
//! | `EMULATED_CUDA_CAPABILITY` | the device's compute capability, `9.0` unless said |
//! | `EMULATED_CUDA_SEED` | what chance begins with; printed with every fault |

mod driver;
mod machine;
mod ptx;
