//! The driver: what there is (contexts, memory, modules), and the calls that a program makes.

mod calls;
mod device;
mod memory;
#[cfg(test)]
mod tests;
mod work;
