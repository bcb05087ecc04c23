//! Streams, events and graphs, with copies as work.

use super::device::{Device, Event};
use super::memory::Kind;
use super::work::{Copy2d, Graph, Node, Stream, Work};

/// A device with a buffer of so many words, and streams.
fn device(words: usize, streams: usize) -> (Device, u64, Vec<u64>) {
    let mut device = Device::default();
    let address = device.memory.allocate(4 * words, Kind::Device).unwrap();
    let made = (0..streams).map(|_| {
        let stream = device.handle();
        device.streams.insert(stream, Stream::default());
        stream
    });
    let made = made.collect();
    (device, address, made)
}

fn put(value: u32, to: u64) -> Work {
    Work::Put(to, value.to_le_bytes().to_vec())
}

fn copy(from: u64, to: u64) -> Work {
    Work::Copy(Copy2d { from, to, from_pitch: 0, to_pitch: 0, width: 4, height: 1 })
}

fn read(address: u64) -> u32 {
    let from: *const u32 = std::ptr::with_exposed_provenance(address as usize);
    // SAFETY: tests read what their device has allocated.
    unsafe { from.read() }
}

/// An event that two streams record stands for the recording that was asked for, whichever is done first.
#[test]
fn a_wait_is_for_one_recording() {
    let (mut device, at, streams) = device(4, 3);
    let event = device.handle();
    device.events.insert(event, Event::default());
    let mut seen = [false; 2];
    for _ in 0..100_000 {
        device.enqueue(streams[0], put(0, at + 4)).unwrap();
        device.synchronize(None).unwrap();
        let record = |device: &mut Device, stream| {
            let times = device.events.get_mut(&event).unwrap().ask();
            device.enqueue(stream, Work::Record(event, times)).unwrap();
            times
        };
        device.enqueue(streams[0], put(1, at)).unwrap();
        device.enqueue(streams[0], put(2, at)).unwrap();
        let first = record(&mut device, streams[0]);
        device.enqueue(streams[1], put(7, at + 4)).unwrap();
        record(&mut device, streams[1]);
        device.enqueue(streams[2], Work::Wait(event, first)).unwrap();
        device.enqueue(streams[2], copy(at, at + 8)).unwrap();
        device.enqueue(streams[2], copy(at + 4, at + 12)).unwrap();
        device.synchronize(Some(streams[2])).unwrap();
        assert_eq!(read(at + 8), 2);
        // Nothing orders what the second stream does: it is seen done, and not done.
        seen[usize::from(read(at + 12) == 7)] = true;
        if seen == [true; 2] {
            return;
        }
    }
    panic!("one of two orders was never taken: {seen:?}");
}

#[test]
fn nothing_is_done_before_somebody_waits() {
    let (mut device, at, streams) = device(1, 1);
    device.enqueue(streams[0], put(9, at)).unwrap();
    assert_eq!(read(at), u32::MAX);
    device.synchronize(None).unwrap();
    assert_eq!(read(at), 9);
}

#[test]
fn streams_that_wait_for_each_other_are_an_error() {
    let (mut device, _, streams) = device(1, 1);
    let event = device.handle();
    device.events.insert(event, Event::default());
    let times = device.events.get_mut(&event).unwrap().ask();
    device.enqueue(streams[0], Work::Wait(event, times)).unwrap();
    device.enqueue(streams[0], Work::Record(event, times)).unwrap();
    device.synchronize(None).unwrap_err();
    device.enqueue(streams[0], Work::Record(event, times)).unwrap_err();
}

#[test]
fn copies_stay_inside_what_there_is() {
    let (mut device, at, streams) = device(2, 1);
    device.enqueue(streams[0], put(1, at + 8)).unwrap();
    device.synchronize(None).unwrap_err();
}

#[test]
fn graphs_run_in_every_order_that_edges_allow() {
    let mut graph = Graph::default();
    let first = graph.add(Node::Record(0), vec![]);
    let second = graph.add(Node::Record(0), vec![]);
    let third = graph.add(Node::Record(0), vec![first]);
    let last = graph.add(Node::Record(0), vec![second, third]);
    let mut random = fastrand::Rng::with_seed(3);
    let mut orders = std::collections::BTreeSet::new();
    for _ in 0..64 {
        let order = graph.order(|n| random.usize(..n)).unwrap();
        let place = |node| order.iter().position(|&at| at == node).unwrap();
        assert!(place(first) < place(third) && place(third) < place(last) && place(second) < place(last));
        orders.insert(order);
    }
    assert_eq!(orders.len(), 3);
    graph.nodes[first].1.push(last);
    assert_eq!(graph.order(|_| 0), None);
}
