//! One model and many sessions: a step plans, reserves, runs the layers and commits.

pub mod sampling;
