//! kvahead
