//! The AF_XDP datapath: where its packets go, as the kernel says.

pub mod link;
mod neighbor_table;
pub mod neighbors;
mod netlink;
mod routes;
mod solicit;
