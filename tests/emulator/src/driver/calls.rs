//! The calls that a program makes, by the driver's names: those that the library's CUDA backend makes.

use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

use cudarc::driver::sys::{
    CUDA_KERNEL_NODE_PARAMS, CUDA_MEMCPY2D, CUcontext, CUdevice, CUdevice_attribute, CUdeviceptr, CUevent, CUfunction,
    CUfunction_attribute, CUgraph, CUgraphDependencyType_enum, CUgraphEdgeData, CUgraphExec, CUgraphNode,
    CUlaunchAttributeID, CUlaunchAttributeValue, CUmemorytype, CUmodule, CUresult, CUstream,
};

use super::device::{self, Event, Outcome, device};
use super::memory::Kind;
use super::work::{Copy2d, Graph, Launch, Node, Stream, Work};

use CUresult::{
    CUDA_ERROR_INVALID_DEVICE as INVALID_DEVICE, CUDA_ERROR_INVALID_HANDLE as INVALID_HANDLE,
    CUDA_ERROR_INVALID_VALUE as INVALID_VALUE, CUDA_ERROR_NOT_SUPPORTED as NOT_SUPPORTED,
};

/// The handle of the one context.
const CONTEXT: usize = 1;

thread_local! {
    static CURRENT: RefCell<Vec<CUcontext>> = const { RefCell::new(Vec::new()) };
}

fn code(outcome: Outcome) -> CUresult {
    outcome.err().unwrap_or(CUresult::CUDA_SUCCESS)
}

/// Writes what a call returns, where the program wants it.
///
/// # Safety
/// `to` is null or valid for a write.
unsafe fn give<T>(to: *mut T, outcome: Outcome<T>) -> CUresult {
    match outcome {
        Ok(_) if to.is_null() => INVALID_VALUE,
        Ok(value) => {
            // SAFETY: the caller's.
            unsafe { to.write(value) };
            CUresult::CUDA_SUCCESS
        }
        Err(code) => code,
    }
}

/// A number as one of the handles that programs see.
fn handle<T>(number: u64) -> *mut T {
    std::ptr::without_provenance_mut(number as usize)
}

fn number<T>(handle: *mut T) -> u64 {
    handle.addr() as u64
}

#[unsafe(no_mangle)]
extern "C" fn cuInit(_flags: c_uint) -> CUresult {
    CUresult::CUDA_SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> CUresult {
    // SAFETY: the program's pointer.
    unsafe { give(version, Ok(12_040)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGetErrorName(error: CUresult, name: *mut *const c_char) -> CUresult {
    // SAFETY: the program's pointer; the texts live for ever.
    unsafe { give(name, Ok(describe(error).0.as_ptr())) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGetErrorString(error: CUresult, text: *mut *const c_char) -> CUresult {
    // SAFETY: as above.
    unsafe { give(text, Ok(describe(error).1.as_ptr())) }
}

fn describe(error: CUresult) -> (&'static CStr, &'static CStr) {
    match error {
        CUresult::CUDA_SUCCESS => (c"CUDA_SUCCESS", c"no error"),
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => (c"CUDA_ERROR_OUT_OF_MEMORY", c"out of memory"),
        CUresult::CUDA_ERROR_ILLEGAL_ADDRESS => (c"CUDA_ERROR_ILLEGAL_ADDRESS", c"a kernel did what it may not"),
        CUresult::CUDA_ERROR_INVALID_PTX => (c"CUDA_ERROR_INVALID_PTX", c"a module is not understood"),
        INVALID_DEVICE => (c"CUDA_ERROR_INVALID_DEVICE", c"invalid device ordinal"),
        INVALID_HANDLE => (c"CUDA_ERROR_INVALID_HANDLE", c"invalid resource handle"),
        INVALID_VALUE => (c"CUDA_ERROR_INVALID_VALUE", c"invalid argument"),
        NOT_SUPPORTED => (c"CUDA_ERROR_NOT_SUPPORTED", c"not emulated"),
        _ => (c"CUDA_ERROR_UNKNOWN", c"an error of the emulated driver"),
    }
}

// ---- the device and its context

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> CUresult {
    // SAFETY: the program's pointer.
    unsafe { give(count, Ok(1)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGet(device: *mut CUdevice, ordinal: c_int) -> CUresult {
    // SAFETY: the program's pointer.
    unsafe { give(device, if ordinal == 0 { Ok(0) } else { Err(INVALID_DEVICE) }) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, bytes: c_int, _device: CUdevice) -> CUresult {
    let text = c"an emulated device";
    if name.is_null() || (bytes as usize) < text.count_bytes() + 1 {
        return INVALID_VALUE;
    }
    // SAFETY: the program's pointer, with room for the text and its end.
    unsafe { name.copy_from_nonoverlapping(text.as_ptr(), text.count_bytes() + 1) };
    CUresult::CUDA_SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetAttribute(
    value: *mut c_int,
    attribute: CUdevice_attribute,
    _device: CUdevice,
) -> CUresult {
    let (major, minor) = device::capability();
    let known = match attribute {
        CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR => Ok(major),
        CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR => Ok(minor),
        CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN => Ok(device::MOST_SHARED as c_int),
        CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT => Ok(device::MULTIPROCESSORS),
        _ => Err(NOT_SUPPORTED),
    };
    // SAFETY: the program's pointer.
    unsafe { give(value, known) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut CUcontext, _device: CUdevice) -> CUresult {
    // SAFETY: the program's pointer.
    unsafe { give(context, Ok(std::ptr::without_provenance_mut(CONTEXT))) }
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRelease_v2(_device: CUdevice) -> CUresult {
    CUresult::CUDA_SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxGetCurrent(context: *mut CUcontext) -> CUresult {
    let current = CURRENT.with_borrow(|stack| stack.last().copied()).unwrap_or(std::ptr::null_mut());
    // SAFETY: the program's pointer.
    unsafe { give(context, Ok(current)) }
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxPushCurrent_v2(context: CUcontext) -> CUresult {
    CURRENT.with_borrow_mut(|stack| stack.push(context));
    CUresult::CUDA_SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxPopCurrent_v2(context: *mut CUcontext) -> CUresult {
    let popped = CURRENT.with_borrow_mut(Vec::pop).ok_or(CUresult::CUDA_ERROR_INVALID_CONTEXT);
    // SAFETY: the program's pointer.
    unsafe { give(context, popped) }
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSynchronize() -> CUresult {
    code(device().synchronize(None))
}

// ---- modules

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleLoadData(module: *mut CUmodule, image: *const c_void) -> CUresult {
    if image.is_null() {
        return INVALID_VALUE;
    }
    // SAFETY: the program says that this is PTX, which ends with a zero.
    let text = unsafe { CStr::from_ptr(image.cast()) };
    let loaded = text.to_str().map_err(|_| INVALID_VALUE).and_then(|text| device().load(text));
    // SAFETY: the program's pointer.
    unsafe { give(module, loaded.map(handle)) }
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleUnload(module: CUmodule) -> CUresult {
    code(device().modules.remove(&number(module)).map(drop).ok_or(INVALID_HANDLE))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleGetFunction(function: *mut CUfunction, module: CUmodule, name: *const c_char) -> CUresult {
    if name.is_null() {
        return INVALID_VALUE;
    }
    // SAFETY: the program's text.
    let name = unsafe { CStr::from_ptr(name) };
    let found = name.to_str().map_err(|_| INVALID_VALUE).and_then(|name| device().function(number(module), name));
    // SAFETY: the program's pointer.
    unsafe { give(function, found.map(handle)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuFuncGetAttribute(
    value: *mut c_int,
    attribute: CUfunction_attribute,
    function: CUfunction,
) -> CUresult {
    let device = device();
    let known = device.functions.get(&number(function)).ok_or(INVALID_HANDLE).and_then(|function| match attribute {
        CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES => Ok(function.kernel.shared_bytes as c_int),
        _ => Err(NOT_SUPPORTED),
    });
    // SAFETY: the program's pointer.
    unsafe { give(value, known) }
}

#[unsafe(no_mangle)]
extern "C" fn cuFuncSetAttribute(function: CUfunction, attribute: CUfunction_attribute, value: c_int) -> CUresult {
    let mut device = device();
    let Some(function) = device.functions.get_mut(&number(function)) else { return INVALID_HANDLE };
    if attribute != CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES {
        return NOT_SUPPORTED;
    }
    if value < 0 || value as u32 + function.kernel.shared_bytes as u32 > device::MOST_SHARED {
        return INVALID_VALUE;
    }
    function.most_dynamic = value as u32;
    CUresult::CUDA_SUCCESS
}

// ---- memory

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemAlloc_v2(address: *mut CUdeviceptr, bytes: usize) -> CUresult {
    let mut device = device();
    let allocated = device.state().and_then(|()| device.memory.allocate(bytes, Kind::Device));
    // SAFETY: the program's pointer.
    unsafe { give(address, allocated) }
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFree_v2(address: CUdeviceptr) -> CUresult {
    let mut device = device();
    // It waits for everything, as a driver does.
    let done = device.synchronize(None);
    code(device.memory.remove(address, Kind::Device).and(done))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemHostAlloc(address: *mut *mut c_void, bytes: usize, _flags: c_uint) -> CUresult {
    let mut device = device();
    let allocated = device.state().and_then(|()| device.memory.allocate(bytes, Kind::Pinned));
    let allocated = allocated.map(|address| std::ptr::with_exposed_provenance_mut(address as usize));
    // SAFETY: the program's pointer.
    unsafe { give(address, allocated) }
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFreeHost(address: *mut c_void) -> CUresult {
    code(device().memory.remove(number(address), Kind::Pinned))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemHostRegister_v2(address: *mut c_void, bytes: usize, _flags: c_uint) -> CUresult {
    let mut device = device();
    let address = address.expose_provenance() as u64;
    if bytes == 0 || device.memory.holds(address, 1) {
        return INVALID_VALUE;
    }
    device.memory.insert(address, bytes as u64, Kind::Registered);
    CUresult::CUDA_SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn cuMemHostUnregister(address: *mut c_void) -> CUresult {
    code(device().memory.remove(number(address), Kind::Registered))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemHostGetDevicePointer_v2(
    address: *mut CUdeviceptr,
    host: *mut c_void,
    _flags: c_uint,
) -> CUresult {
    let known = device().memory.holds(number(host), 1).then_some(number(host)).ok_or(INVALID_VALUE);
    // SAFETY: the program's pointer.
    unsafe { give(address, known) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> CUresult {
    let (left, all) = device().memory.info();
    // SAFETY: the program's pointers.
    unsafe {
        give(total, Ok(all as usize));
        give(free, Ok(left as usize))
    }
}

/// On the null stream, which other streams do not wait for: done at once.
#[unsafe(no_mangle)]
extern "C" fn cuMemsetD8_v2(address: CUdeviceptr, value: u8, bytes: usize) -> CUresult {
    let device = device();
    if !device.memory.holds(address, bytes as u64) {
        return INVALID_VALUE;
    }
    // SAFETY: memory that the device has.
    unsafe { std::ptr::with_exposed_provenance_mut::<u8>(address as usize).write_bytes(value, bytes) };
    code(device.state())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyHtoDAsync_v2(
    to: CUdeviceptr,
    from: *const c_void,
    bytes: usize,
    stream: CUstream,
) -> CUresult {
    let mut device = device();
    let address = from.expose_provenance() as u64;
    let (to_pitch, width) = (0, bytes as u64);
    let work = if device.memory.holds(address, width) {
        Work::Copy(Copy2d { from: address, to, from_pitch: 0, to_pitch, width, height: 1 })
    } else {
        // SAFETY: the program vouches for its bytes until the call returns.
        Work::Put(to, unsafe { std::slice::from_raw_parts(from.cast::<u8>(), bytes) }.to_vec())
    };
    code(device.enqueue(number(stream), work))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpy2DAsync_v2(copy: *const CUDA_MEMCPY2D, stream: CUstream) -> CUresult {
    // SAFETY: the program's structure.
    let Some(copy) = (unsafe { copy.as_ref() }) else { return INVALID_VALUE };
    let place = |kind, host: u64, device: CUdeviceptr| match kind {
        CUmemorytype::CU_MEMORYTYPE_HOST => Ok(host),
        CUmemorytype::CU_MEMORYTYPE_DEVICE | CUmemorytype::CU_MEMORYTYPE_UNIFIED => Ok(device),
        CUmemorytype::CU_MEMORYTYPE_ARRAY => Err(NOT_SUPPORTED),
    };
    let from = place(copy.srcMemoryType, copy.srcHost.expose_provenance() as u64, copy.srcDevice);
    let to = place(copy.dstMemoryType, copy.dstHost.expose_provenance() as u64, copy.dstDevice);
    let (from, to) = match (from, to) {
        (Ok(from), Ok(to)) => (from, to),
        (Err(code), _) | (_, Err(code)) => return code,
    };
    let rows = Copy2d {
        from: from + (copy.srcY * copy.srcPitch + copy.srcXInBytes) as u64,
        to: to + (copy.dstY * copy.dstPitch + copy.dstXInBytes) as u64,
        from_pitch: copy.srcPitch as u64,
        to_pitch: copy.dstPitch as u64,
        width: copy.WidthInBytes as u64,
        height: copy.Height as u64,
    };
    let mut device = device();
    // To or from the program's own memory it is done when the call returns.
    let own = |address| !device.memory.holds(address, rows.width);
    let waits = own(rows.from) || own(rows.to);
    let enqueued = device.enqueue(number(stream), Work::Copy(rows));
    code(enqueued.and_then(|()| if waits { device.synchronize(Some(number(stream))) } else { Ok(()) }))
}

// ---- streams and events

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamCreateWithPriority(stream: *mut CUstream, _flags: c_uint, _priority: c_int) -> CUresult {
    let mut device = device();
    let made = device.handle();
    device.streams.insert(made, Stream::default());
    // SAFETY: the program's pointer.
    unsafe { give(stream, Ok(handle(made))) }
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamDestroy_v2(stream: CUstream) -> CUresult {
    let mut device = device();
    let done = device.synchronize(Some(number(stream)));
    code(device.streams.remove(&number(stream)).map(drop).ok_or(INVALID_HANDLE).and(done))
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamSynchronize(stream: CUstream) -> CUresult {
    let mut device = device();
    // What is done on the null stream has been done.
    code(if stream.is_null() { device.state() } else { device.synchronize(Some(number(stream))) })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamWaitEvent(stream: CUstream, event: CUevent, _flags: c_uint) -> CUresult {
    let mut device = device();
    let Some(asked) = device.events.get(&number(event)).map(|event| event.asked) else { return INVALID_HANDLE };
    code(device.enqueue(number(stream), Work::Wait(number(event), asked)))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventCreate(event: *mut CUevent, _flags: c_uint) -> CUresult {
    let mut device = device();
    let made = device.handle();
    device.events.insert(made, Event::default());
    // SAFETY: the program's pointer.
    unsafe { give(event, Ok(handle(made))) }
}

#[unsafe(no_mangle)]
extern "C" fn cuEventDestroy_v2(event: CUevent) -> CUresult {
    code(device().events.remove(&number(event)).map(drop).ok_or(INVALID_HANDLE))
}

#[unsafe(no_mangle)]
extern "C" fn cuEventRecord(event: CUevent, stream: CUstream) -> CUresult {
    let mut device = device();
    let Some(known) = device.events.get_mut(&number(event)) else { return INVALID_HANDLE };
    let times = known.ask();
    code(device.enqueue(number(stream), Work::Record(number(event), times)))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventElapsedTime(milliseconds: *mut f32, begin: CUevent, end: CUevent) -> CUresult {
    let device = device();
    let when = |event: CUevent| device.events.get(&number(event)).ok_or(INVALID_HANDLE).map(|event| event.when);
    let elapsed = when(begin).and_then(|begin| match (begin, when(end)?) {
        (Some(begin), Some(end)) => Ok(end.saturating_duration_since(begin).as_secs_f32() * 1e3),
        _ => Err(CUresult::CUDA_ERROR_NOT_READY),
    });
    // SAFETY: the program's pointer.
    unsafe { give(milliseconds, elapsed) }
}

// ---- launches and graphs

/// # Safety
/// `params` points to a pointer for each parameter, each valid for its bytes.
unsafe fn launch_of(
    device: &device::Device,
    function: CUfunction,
    grid: [u32; 3],
    threads: [u32; 3],
    dynamic: u32,
    params: *mut *mut c_void,
) -> Outcome<Launch> {
    device.launch(number(function), grid, threads, dynamic, |at, size, to| {
        // SAFETY: the caller's.
        let from = unsafe { std::slice::from_raw_parts((*params.add(at)).cast::<u8>(), size) };
        to.copy_from_slice(from);
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuLaunchKernel(
    function: CUfunction,
    grid_x: c_uint,
    grid_y: c_uint,
    grid_z: c_uint,
    block_x: c_uint,
    block_y: c_uint,
    block_z: c_uint,
    dynamic: c_uint,
    stream: CUstream,
    params: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> CUresult {
    if !extra.is_null() || params.is_null() {
        return NOT_SUPPORTED;
    }
    let mut device = device();
    let (grid, threads) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
    // SAFETY: the program's parameters.
    let launch = unsafe { launch_of(&device, function, grid, threads, dynamic, params) };
    code(launch.and_then(|launch| device.enqueue(number(stream), Work::Launch(Box::new(launch)))))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGraphCreate(graph: *mut CUgraph, _flags: c_uint) -> CUresult {
    let mut device = device();
    let made = device.handle();
    device.graphs.insert(made, Graph::default());
    // SAFETY: the program's pointer.
    unsafe { give(graph, Ok(handle(made))) }
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphDestroy(graph: CUgraph) -> CUresult {
    code(device().graphs.remove(&number(graph)).map(drop).ok_or(INVALID_HANDLE))
}

/// Nodes are handles by the graph's and their own number.
fn node_handle(graph: u64, node: usize) -> CUgraphNode {
    handle(graph << 32 | (node as u64 + 1))
}

fn node_of(graph: CUgraph, node: CUgraphNode) -> Outcome<usize> {
    let (of, at) = (number(node) >> 32, number(node) & 0xffff_ffff);
    if of == number(graph) && at > 0 { Ok(at as usize - 1) } else { Err(INVALID_HANDLE) }
}

/// # Safety
/// `nodes` is valid for `count` handles, or that is 0.
unsafe fn nodes_of(graph: CUgraph, nodes: *const CUgraphNode, count: usize) -> Outcome<Vec<usize>> {
    // SAFETY: the caller's.
    let nodes = (0..count).map(|at| unsafe { nodes.add(at).read() });
    let mut list = nodes.map(|node| node_of(graph, node)).collect::<Outcome<Vec<_>>>()?;
    let all = list.len();
    list.sort_unstable();
    list.dedup();
    // A driver takes no edge twice.
    if list.len() == all { Ok(list) } else { Err(INVALID_VALUE) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGraphAddKernelNode_v2(
    node: *mut CUgraphNode,
    graph: CUgraph,
    after: *const CUgraphNode,
    count: usize,
    params: *const CUDA_KERNEL_NODE_PARAMS,
) -> CUresult {
    // SAFETY: the program's structure.
    let Some(p) = (unsafe { params.as_ref() }) else { return INVALID_VALUE };
    let mut device = device();
    let (grid, threads) = ([p.gridDimX, p.gridDimY, p.gridDimZ], [p.blockDimX, p.blockDimY, p.blockDimZ]);
    // SAFETY: the program's parameters and nodes.
    let (launch, after) = unsafe {
        (launch_of(&device, p.func, grid, threads, p.sharedMemBytes, p.kernelParams), nodes_of(graph, after, count))
    };
    let added = launch.and_then(|launch| add(&mut device, graph, Node::Launch(launch), after?));
    // SAFETY: the program's pointer.
    unsafe { give(node, added) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGraphAddEventRecordNode(
    node: *mut CUgraphNode,
    graph: CUgraph,
    after: *const CUgraphNode,
    count: usize,
    event: CUevent,
) -> CUresult {
    // SAFETY: the program's nodes.
    let after = unsafe { nodes_of(graph, after, count) };
    let added = after.and_then(|after| add(&mut device(), graph, Node::Record(number(event)), after));
    // SAFETY: the program's pointer.
    unsafe { give(node, added) }
}

fn add(device: &mut device::Device, graph: CUgraph, node: Node, after: Vec<usize>) -> Outcome<CUgraphNode> {
    let known = device.graphs.get_mut(&number(graph)).ok_or(INVALID_HANDLE)?;
    if after.iter().any(|&before| before >= known.nodes.len()) {
        return Err(INVALID_VALUE);
    }
    Ok(node_handle(number(graph), known.add(node, after)))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGraphAddDependencies_v2(
    graph: CUgraph,
    from: *const CUgraphNode,
    to: *const CUgraphNode,
    edges: *const CUgraphEdgeData,
    count: usize,
) -> CUresult {
    for at in 0..count {
        // SAFETY: the program's lists of `count` elements.
        let (from, to, edge) = unsafe {
            let edge = if edges.is_null() { None } else { Some(edges.add(at).read()) };
            (node_of(graph, from.add(at).read()), node_of(graph, to.add(at).read()), edge)
        };
        let (Ok(from), Ok(to)) = (from, to) else { return INVALID_HANDLE };
        let mut device = device();
        let Some(known) = device.graphs.get_mut(&number(graph)) else { return INVALID_HANDLE };
        if from.max(to) >= known.nodes.len() || known.nodes[to].1.contains(&from) {
            return INVALID_VALUE;
        }
        let programmatic = CUgraphDependencyType_enum::CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC as u8;
        if edge.is_some_and(|edge| edge.type_ == programmatic) {
            let waits = |node: &Node| matches!(node, Node::Launch(launch) if launch.kernel.waits);
            if !waits(&known.nodes[to].0) || !matches!(known.nodes[from].0, Node::Launch(_)) {
                eprintln!("emulated CUDA: a launch may begin early that does not wait, or behind what is no launch");
                return INVALID_VALUE;
            }
            known.early[to] = true;
        }
        known.nodes[to].1.push(from);
    }
    CUresult::CUDA_SUCCESS
}

/// Priorities, which change no result.
#[unsafe(no_mangle)]
extern "C" fn cuGraphKernelNodeSetAttribute(
    _node: CUgraphNode,
    attribute: CUlaunchAttributeID,
    _value: *const CUlaunchAttributeValue,
) -> CUresult {
    match attribute {
        CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PRIORITY => CUresult::CUDA_SUCCESS,
        _ => NOT_SUPPORTED,
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGraphInstantiateWithFlags(exec: *mut CUgraphExec, graph: CUgraph, _flags: u64) -> CUresult {
    let mut device = device();
    let known = device.graphs.get(&number(graph)).cloned().ok_or(INVALID_HANDLE);
    let made = known.and_then(|graph| {
        graph.order(|_| 0).ok_or(INVALID_VALUE)?;
        let made = device.handle();
        device.execs.insert(made, graph.into());
        Ok(handle(made))
    });
    // SAFETY: the program's pointer.
    unsafe { give(exec, made) }
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphExecDestroy(exec: CUgraphExec) -> CUresult {
    code(device().execs.remove(&number(exec)).map(drop).ok_or(INVALID_HANDLE))
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphLaunch(exec: CUgraphExec, stream: CUstream) -> CUresult {
    let mut device = device();
    let Some(graph) = device.execs.get(&number(exec)).cloned() else { return INVALID_HANDLE };
    code(device.enqueue(number(stream), Work::Graph(graph)))
}
