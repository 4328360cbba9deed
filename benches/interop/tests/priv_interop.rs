//! Independent QUIC implementations against ours, over a veth pair: files by hq-interop,
//! both ways, over every datapath. Needs root.

#[path = "../../../engine/tests/common/netns.rs"]
#[allow(dead_code, unreachable_pub)] // each test file uses its own part
mod netns;

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use netns::{Netns, veth};
use sha2::{Digest, Sha256};

/// Our datapaths under test.
const DATAPATHS: [&str; 3] = ["af_xdp", "io_uring", "socket"];
/// The independent stacks.
const STACKS: [&str; 2] = ["s2n", "quiche"];
/// The files, by name and size.
const FILES: [(&str, usize); 4] =
    [("empty", 0), ("one", 1), ("mega", 1 << 20), ("large", 20 << 20)];
/// No transfer of these tests takes longer.
const PATIENCE: Duration = Duration::from_secs(60);
const PORT: u16 = 4433;

/// Two hosts, a directory of files, and certificates.
struct Lab {
    ours: Netns,
    theirs: Netns,
    dir: PathBuf,
}

impl Lab {
    fn new(label: &str, mtu: u32) -> Self {
        let (ours, theirs) = (Netns::new(label), Netns::new(label));
        veth((&ours, "veth0"), (&theirs, "veth0"));
        for (host, address) in [(&ours, "fd53:1::1/64"), (&theirs, "fd53:1::2/64")] {
            host.ip(&format!("link set veth0 mtu {mtu}"));
            host.add_address("veth0", address);
        }
        let dir = std::env::temp_dir().join(format!("stoq-{}", ours.name()));
        std::fs::create_dir_all(dir.join("www")).expect("temporary directory");
        for (name, size) in FILES {
            std::fs::write(dir.join("www").join(name), content(size)).expect("file written");
        }
        let names = ["localhost".to_owned(), "fd53:1::2".to_owned()];
        let made = rcgen::generate_simple_self_signed(names).expect("certificate");
        std::fs::write(dir.join("peer.pem"), made.cert.pem()).expect("certificate written");
        let key = dir.join("peer.key");
        std::fs::write(&key, made.signing_key.serialize_pem()).expect("key written");
        Self { ours, theirs, dir }
    }

    fn path(&self, name: &str) -> String {
        self.dir.join(name).to_str().expect("UTF-8").to_owned()
    }

    fn stoq(&self, arguments: &[&str]) -> Command {
        in_namespace(&self.ours, &binary("stoq"), arguments)
    }

    fn peer(&self, arguments: &[&str]) -> Command {
        in_namespace(&self.theirs, &binary("stoq-peer"), arguments)
    }

    /// Every fetched file is what was served.
    fn check_files(&self, out: &str) {
        for (name, size) in FILES {
            let got = std::fs::read(Path::new(out).join(name)).expect("fetched file");
            assert_eq!(got.len(), size, "{name}");
            assert_eq!(Sha256::digest(&got), Sha256::digest(content(size)), "{name}");
        }
    }

    fn fresh_out(&self) -> String {
        let out = self.dir.join("out");
        if out.exists() {
            std::fs::remove_dir_all(&out).expect("old files removed");
        }
        std::fs::create_dir_all(&out).expect("directory");
        out.to_str().expect("UTF-8").to_owned()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.dir) {
            eprintln!("{} stays: {error}", self.dir.display());
        }
    }
}

fn content(size: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    (0..size)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .collect()
}

/// The binary that this test's own build made.
fn binary(name: &str) -> PathBuf {
    if name == "stoq-peer" {
        return env!("CARGO_BIN_EXE_stoq-peer").into();
    }
    // The workspace builds `stoq` into the same directory.
    let path = Path::new(env!("CARGO_BIN_EXE_stoq-peer")).with_file_name(name);
    assert!(path.is_file(), "{}: build it first (cargo xtask test does)", path.display());
    path
}

fn in_namespace(host: &Netns, program: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", host.name()]).arg(program).args(arguments);
    command
}

/// A server that is killed when dropped.
struct Server(Child);

impl Server {
    /// Starts it and waits for the line that says it listens.
    fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().expect("server starts");
        let mut line = String::new();
        let out = child.stdout.take().expect("piped");
        BufReader::new(out).read_line(&mut line).expect("server speaks");
        assert!(line.contains("listening"), "server said {line:?}");
        Self(child)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Gone already is as good.
        let _already_gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// Runs a client to its end; its standard error on failure.
fn finish(mut command: Command) -> Result<(), String> {
    let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().expect("starts");
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("waits") {
            let mut text = String::new();
            child.stderr.take().expect("piped").read_to_string(&mut text).expect("UTF-8");
            return if status.success() { Ok(()) } else { Err(text) };
        }
        if start.elapsed() > PATIENCE {
            child.kill().expect("killed");
            panic!("hangs: {command:?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn their_client_fetches_from_us(label: &str, mtu: u32) {
    for datapath in DATAPATHS {
        let lab = Lab::new(label, mtu);
        let (www, ca) = (lab.path("www"), lab.path("ca.pem"));
        let listen = format!("[fd53:1::1]:{PORT}");
        let _server = Server::start(lab.stoq(&[
            "serve",
            "--listen",
            &listen,
            "--www",
            &www,
            "--cert-out",
            &ca,
            "--json",
            "--datapath",
            datapath,
            "--iface",
            "veth0",
        ]));
        for stack in STACKS {
            let out = lab.fresh_out();
            let mut arguments =
                vec![stack, "get", "--connect", &listen, "--ca", &ca, "--out", &out];
            arguments.extend(["/empty", "/one", "/mega", "/large"]);
            finish(lab.peer(&arguments)).unwrap_or_else(|error| {
                panic!("{stack} from our {datapath} at MTU {mtu}: {error}")
            });
            lab.check_files(&out);
            // An unknown file is an error, soon, and no hang.
            let missing = [stack, "get", "--connect", &listen, "--ca", &ca, "--out", &out, "/none"];
            let error = finish(lab.peer(&missing)).expect_err("no such file");
            assert!(error.to_lowercase().contains("reset"), "{stack}: {error}");
            println!("MTU {mtu}: {stack} client <- our {datapath} server: intact");
        }
    }
}

fn our_client_fetches_from_them(label: &str, mtu: u32) {
    for stack in STACKS {
        let lab = Lab::new(label, mtu);
        let (www, ca, key) = (lab.path("www"), lab.path("peer.pem"), lab.path("peer.key"));
        let listen = format!("[fd53:1::2]:{PORT}");
        let _server = Server::start(lab.peer(&[
            stack, "serve", "--listen", &listen, "--cert", &ca, "--key", &key, "--www", &www,
        ]));
        let urls = FILES.map(|(name, _)| format!("https://{listen}/{name}"));
        for datapath in DATAPATHS {
            let out = lab.fresh_out();
            let common = ["--ca", &ca, "--datapath", datapath, "--iface", "veth0", "--out", &out];
            let mut arguments = vec!["get"];
            arguments.extend(urls.iter().map(String::as_str));
            arguments.extend(common);
            finish(lab.stoq(&arguments)).unwrap_or_else(|error| {
                panic!("our {datapath} from {stack} at MTU {mtu}: {error}")
            });
            lab.check_files(&out);
            let missing = format!("https://{listen}/none");
            let mut arguments = vec!["get", &missing];
            arguments.extend(common);
            let error = finish(lab.stoq(&arguments)).expect_err("no such file");
            assert!(error.contains("reset"), "{error}");
            println!("MTU {mtu}: our {datapath} client <- {stack} server: intact");
        }
    }
}

#[test]
fn their_clients_accept_a_node_of_our_ca_before_and_after_a_renewal() {
    a_node_of_our_ca("ie", &[], &STACKS);
}

/// Of a CA that may name little. quiche's BoringSSL knows no name constraints on addresses and refuses
/// every leaf that carries one.
#[test]
fn s2n_accepts_a_constrained_chain_before_and_after_a_renewal() {
    a_node_of_our_ca(
        "if",
        &["--permit-dns", "localhost", "--permit-ipv6", "fd53:1::/64"],
        &["s2n"],
    );
}

/// A node whose certificate comes from a CA elsewhere: root, intermediate, and a leaf that is renewed
/// meanwhile.
fn a_node_of_our_ca(label: &str, constraints: &[&str], stacks: &[&str]) {
    let lab = Lab::new(label, 1500);
    let (dir, root, token, store) =
        (lab.path("ca"), lab.path("root.pem"), lab.path("token"), lab.path("node.pem"));
    let output = |arguments: &[&str]| {
        let output = lab.stoq(arguments).output().expect("runs");
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        output.stdout
    };
    let ca = "[fd53:1::1]:4434";
    let serve = ["ca", "serve", "--dir", &dir, "--listen", ca, "--lifetime-s", "60", "--json"];
    let _ca = Server::start(lab.stoq(&[&serve[..], constraints].concat()));
    std::fs::write(&root, output(&["ca", "root", "--dir", &dir])).expect("written");
    let names = "localhost,fd53:1::1";
    let made = output(&["ca", "token", "--dir", &dir, "--names", names]);
    std::fs::write(&token, made).expect("written");
    let (www, listen) = (lab.path("www"), format!("[fd53:1::1]:{PORT}"));
    let _server = Server::start(lab.stoq(&[
        "serve",
        "--listen",
        &listen,
        "--www",
        &www,
        "--datapath",
        "socket",
        "--ca-connect",
        ca,
        "--ca-root",
        &root,
        "--ca-token-file",
        &token,
        "--ca-store",
        &store,
        "--json",
    ]));
    let fetch = |when: &str| {
        for &stack in stacks {
            let out = lab.fresh_out();
            let mut arguments =
                vec![stack, "get", "--connect", &listen, "--ca", &root, "--out", &out];
            arguments.extend(["/empty", "/one", "/mega", "/large"]);
            finish(lab.peer(&arguments))
                .unwrap_or_else(|error| panic!("{stack}, {when} the renewal: {error}"));
            lab.check_files(&out);
        }
    };
    fetch("before");
    // Between 30 and 40 s of its 60 are over.
    let first = std::fs::read(&store).expect("stored");
    let start = Instant::now();
    while std::fs::read(&store).expect("stored") == first {
        assert!(start.elapsed() < PATIENCE, "not renewed");
        std::thread::sleep(Duration::from_millis(200));
    }
    fetch("after");
}

#[test]
fn their_clients_at_mtu_1500() {
    their_client_fetches_from_us("ia", 1500);
}

#[test]
fn their_clients_at_mtu_9000() {
    their_client_fetches_from_us("ib", 9000);
}

#[test]
fn our_clients_at_mtu_1500() {
    our_client_fetches_from_them("ic", 1500);
}

#[test]
fn our_clients_at_mtu_9000() {
    our_client_fetches_from_them("id", 9000);
}
