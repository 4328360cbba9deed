//! `stoq ca`: a certificate authority of one's own, served over STOQ (`trustchain/1`).
//!
//! ```text
//! DIR/ca/         the CA: keys, books, root.pem, crl.pem; locked by the process that serves
//! DIR/tokens/     enrolment tokens, made by `token` while `serve` runs
//! DIR/revocations/  orders of `revoke` to the process that serves, and its answers
//! DIR/fleet.key   what the secrets of fleets are derived from
//! ```

use std::net::{Ipv6Addr, SocketAddrV6};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use clap::{Args as ClapArgs, Subcommand};
use serde_json::json;
use signal_hook::consts::{SIGINT, SIGTERM};
use stoq::ca::{CaService, RemoteCa, RemoteCaConfig};
use stoq::certs::trustchain::{TRUSTCHAIN_ALPN, TokenDirectory, TrustchainServer};
use stoq::certs::{
    CertsError, ClientAuth, IdentityNames, KeyAlgorithm, LocalCa, LocalCaConfig, MaintenanceThread,
    Periodic, RevocationDesk, RevocationDirectory, RotatingIdentity, ServerTls, SharedKeys,
    SystemWallClock, TrustStore, certificates_from_file,
};

use crate::engine::faults_json;
use crate::output;

/// How long `revoke` waits for a CA that serves.
const REVOCATION_PATIENCE: Duration = Duration::from_secs(30);

/// Flags of `stoq ca`.
#[derive(ClapArgs)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve the CA in a directory, which is made if it is missing.
    Serve(Serve),
    /// Make a one-time token for a node's first certificate; works while the CA serves.
    Token(Token),
    /// Print the root certificate (PEM): what nodes and their peers must trust.
    Root(Place),
    /// Get a certificate from a CA into the file --ca-store, with its key: for a client, or for other
    /// software. Again later, it renews what the file holds.
    Enrol(Enrol),
    /// Revoke every certificate with exactly these names; works while the CA serves, and without.
    Revoke(Revoke),
}

#[derive(ClapArgs)]
struct Place {
    /// The CA's directory.
    #[arg(long)]
    dir: PathBuf,
    /// One JSON object a line on stdout.
    #[arg(long)]
    json: bool,
}

#[derive(ClapArgs)]
struct Serve {
    #[command(flatten)]
    place: Place,
    /// Address and port.
    #[arg(long, default_value = "[::]:4434")]
    listen: SocketAddrV6,
    /// Names of the service's own certificate: DNS names and IPv6 addresses. Default: `localhost` and
    /// the listen address.
    #[arg(long, value_delimiter = ',')]
    names: Vec<String>,
    /// Certify names in these DNS subtrees only. Part of the CA from its making on.
    #[arg(long, value_delimiter = ',')]
    permit_dns: Vec<String>,
    /// Certify addresses in these IPv6 prefixes only (`2001:db8::/32`).
    #[arg(long, value_delimiter = ',')]
    permit_ipv6: Vec<String>,
    /// Kind of the CA's own keys, when it is made.
    #[arg(long, value_enum, default_value_t)]
    key_algorithm: KeyChoice,
    /// Life of the certificates issued, s; at least 60.
    #[arg(long, default_value_t = 86_400)]
    lifetime_s: u64,
    /// Serve Prometheus text over HTTP (`/metrics`) at this address.
    #[arg(long, value_name = "ADDRESS")]
    metrics: Option<SocketAddrV6>,
    /// End when the parent process ends.
    #[arg(long, hide = true)]
    die_with_parent: bool,
}

#[derive(ClapArgs)]
struct Names {
    /// Names to certify: DNS names and IPv6 addresses, comma-separated.
    #[arg(long, value_delimiter = ',')]
    names: Vec<String>,
    /// Client identifier to certify.
    #[arg(long)]
    client_id: Option<String>,
}

#[derive(ClapArgs)]
struct Token {
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    names: Names,
    /// How long the token is good for, s.
    #[arg(long, default_value_t = 3600)]
    lifetime_s: u64,
}

#[derive(ClapArgs)]
struct Revoke {
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    names: Names,
}

#[derive(ClapArgs)]
struct Enrol {
    #[command(flatten)]
    enrol: EnrolArgs,
    #[command(flatten)]
    names: Names,
    /// One JSON object a line on stdout.
    #[arg(long)]
    json: bool,
}

/// Kinds of keys, as flags name them.
#[derive(clap::ValueEnum, Clone, Copy, Debug, Default)]
pub enum KeyChoice {
    /// ECDSA on P-256: small, and every peer verifies it.
    #[default]
    EcdsaP256,
    /// ML-DSA-65, post-quantum: a round trip more, for peers that know it.
    #[value(name = "ml-dsa-65")]
    MlDsa65,
}

impl From<KeyChoice> for KeyAlgorithm {
    fn from(choice: KeyChoice) -> Self {
        match choice {
            KeyChoice::EcdsaP256 => Self::EcdsaP256,
            KeyChoice::MlDsa65 => Self::MlDsa65,
        }
    }
}

/// Flags of a command that gets its certificate from a CA elsewhere.
#[derive(ClapArgs, Clone, Debug)]
pub struct EnrolArgs {
    /// Get the certificate from the CA at this address (`stoq ca serve`).
    #[arg(long, requires = "ca_root")]
    ca_connect: Option<SocketAddrV6>,
    /// The CA's root (PEM): `stoq ca root`.
    #[arg(long)]
    ca_root: Option<PathBuf>,
    /// The name that the CA's own certificate must show; its address otherwise.
    #[arg(long)]
    ca_name: Option<String>,
    /// File with the one-time token for the first certificate: the output of `stoq ca token`.
    #[arg(long)]
    ca_token_file: Option<PathBuf>,
    /// Keep key and certificate in this file (mode 0600), so that a restart needs no token.
    #[arg(long)]
    ca_store: Option<PathBuf>,
    /// How long a request to the CA may take, s.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=600))]
    ca_timeout_s: u64,
    /// Kind of the keys that are made for certificates, of a CA elsewhere or of one's own.
    #[arg(long, value_enum, default_value_t)]
    key_algorithm: KeyChoice,
}

impl EnrolArgs {
    /// Kind of the keys to make.
    pub fn key_algorithm(&self) -> KeyAlgorithm {
        self.key_algorithm.into()
    }

    /// The identity that the CA certifies, if one was asked for.
    pub fn identity(
        &self,
        names: impl FnOnce() -> anyhow::Result<IdentityNames>,
    ) -> anyhow::Result<Option<Arc<RotatingIdentity>>> {
        let (Some(address), Some(root)) = (self.ca_connect, &self.ca_root) else {
            return Ok(None);
        };
        let roots = certificates_from_file(root)?;
        let name = self.ca_name.clone().unwrap_or_else(|| address.ip().to_string());
        let mut config = RemoteCaConfig::new(address, name, roots.clone());
        config.token = match &self.ca_token_file {
            Some(path) => {
                let text = std::fs::read_to_string(path)
                    .with_context(|| format!("reading {}", path.display()))?;
                Some(text.trim().to_owned())
            }
            None => None,
        };
        config.timeout = Duration::from_secs(self.ca_timeout_s);
        let ca = RemoteCa::new(config)?;
        let mut builder = RotatingIdentity::with_authority(ca, names()?)
            .roots(roots)
            .key_algorithm(self.key_algorithm());
        if let Some(path) = &self.ca_store {
            builder = builder.store(path);
        }
        Ok(Some(builder.start().context("enrolling with the CA")?))
    }
}

/// Runs the command.
pub fn run(args: &Args) -> anyhow::Result<()> {
    match &args.command {
        Command::Serve(args) => serve(args),
        Command::Token(args) => token(args),
        Command::Root(place) => root(place),
        Command::Enrol(args) => enrol(args),
        Command::Revoke(args) => revoke(args),
    }
}

fn serve(args: &Serve) -> anyhow::Result<()> {
    if args.die_with_parent {
        let signal = rustix::process::Signal::TERM;
        rustix::process::set_parent_process_death_signal(Some(signal))
            .context("prctl(PR_SET_PDEATHSIG)")?;
    }
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM])
        .context("installing signal handlers")?;
    make_directory(&args.place.dir)?;
    let config = LocalCaConfig {
        leaf_lifetime: Duration::from_secs(args.lifetime_s),
        key_algorithm: args.key_algorithm.into(),
        permitted_dns: args.permit_dns.clone(),
        permitted_ipv6: args
            .permit_ipv6
            .iter()
            .map(|text| prefix(text))
            .collect::<anyhow::Result<_>>()?,
        ..LocalCaConfig::default()
    };
    let ca_dir = args.place.dir.join("ca");
    let ca = Arc::new(LocalCa::open(&ca_dir, config)?);
    ca.revocation_list()?;
    let trust = TrustStore::builder().roots([ca.root()]).crl_pem(ca_dir.join("crl.pem")).build()?;
    let own = match args.names.is_empty() {
        true => crate::tls::listen_names(args.listen, &[])?,
        false => crate::tls::add_names(IdentityNames::new(), &args.names)?,
    };
    let tls = ServerTls::builder()
        .identity(own_identity(&ca, own, args.key_algorithm.into())?)
        .client_auth(ClientAuth::Optional(trust))
        .alpn([TRUSTCHAIN_ALPN])
        .build()?;
    let server = TrustchainServer::new(ca.clone(), Arc::new(SystemWallClock))
        .with_tokens(TokenDirectory::open(&args.place.dir.join("tokens"))?)
        .with_fleet_keys(SharedKeys::load_or_create(&args.place.dir.join("fleet.key"))?);
    let server = Arc::new(server);
    let orders = RevocationDirectory::open(&args.place.dir.join("revocations"))?;
    // The desk before the trust, so that a new list is read in the same round.
    let mut tasks: Vec<Arc<dyn Periodic>> = vec![Arc::new(RevocationDesk::new(ca.clone(), orders))];
    tasks.extend(tls.tasks());
    tasks.push(ca);
    let _maintenance = MaintenanceThread::spawn(Arc::new(SystemWallClock), tasks)?;
    let service = CaService::start_with_metrics(args.listen, args.metrics, &tls, server.clone())?;
    announce(args, &service)?;
    while signals.pending().next().is_none() {
        anyhow::ensure!(service.is_running(), "the service ended by itself; see the log above");
        std::thread::sleep(Duration::from_millis(20));
    }
    drop(service);
    if args.place.json {
        let counters = server.counters();
        output::json_line(&json!({
            "event": "stopped",
            "enrolled": counters.enrolled,
            "renewed": counters.renewed,
            "refused": counters.refused,
            "faults": {
                "trustchain": faults_json(server.faults()),
                "server": faults_json(tls.faults()),
            },
        }))?;
    }
    Ok(())
}

fn own_identity(
    ca: &Arc<LocalCa>,
    names: IdentityNames,
    algorithm: KeyAlgorithm,
) -> anyhow::Result<Arc<RotatingIdentity>> {
    RotatingIdentity::with_authority(ca.clone(), names)
        .key_algorithm(algorithm)
        .roots([ca.root()])
        .start()
        .context("the service's own certificate (--names)")
}

fn announce(args: &Serve, service: &CaService) -> anyhow::Result<()> {
    let address = service.local_addr().to_string();
    if args.place.json {
        return output::json_line(&json!({
            "event": "listening", "addr": address,
            "metrics": service.metrics_addr().map(|addr| addr.to_string()),
        }));
    }
    eprintln!("certificate service on {address}, CA in {}", args.place.dir.display());
    Ok(())
}

fn token(args: &Token) -> anyhow::Result<()> {
    let names = args.names.parse()?;
    let root = args.place.dir.join("ca/root.pem");
    anyhow::ensure!(
        root.exists(),
        "{} holds no CA: `stoq ca serve --dir` makes one",
        args.place.dir.display()
    );
    let tokens = TokenDirectory::open(&args.place.dir.join("tokens"))?;
    let lifetime = Duration::from_secs(args.lifetime_s);
    let token = tokens.create(&names, lifetime, SystemTime::now())?;
    if args.place.json {
        return output::json_line(&json!({ "token": token, "lifetime_s": args.lifetime_s }));
    }
    println!("{token}");
    Ok(())
}

fn root(place: &Place) -> anyhow::Result<()> {
    let path = place.dir.join("ca/root.pem");
    let pem = std::fs::read_to_string(&path).with_context(|| {
        format!("reading {} (`stoq ca serve --dir` makes the CA)", path.display())
    })?;
    if place.json {
        return output::json_line(&json!({ "root_pem": pem }));
    }
    print!("{pem}");
    Ok(())
}

fn enrol(args: &Enrol) -> anyhow::Result<()> {
    let names = args.names.parse()?;
    let store = args.enrol.ca_store.as_deref().context("--ca-store FILE says where to")?;
    let identity = args.enrol.identity(|| Ok(names))?.context("--ca-connect names the CA")?;
    // What was stored serves, unless its renewal is due.
    identity.poll(SystemTime::now());
    let status = identity.status();
    if let Some(error) = &status.last_error {
        anyhow::bail!("{}: {error}", store.display());
    }
    if args.json {
        return output::json_line(&crate::engine::rotation_json(&status));
    }
    let serial = status.serial.as_deref().unwrap_or_default();
    println!("{}: certificate {serial}", store.display());
    Ok(())
}

fn revoke(args: &Revoke) -> anyhow::Result<()> {
    let names = args.names.parse()?;
    let dir = args.place.dir.join("ca");
    anyhow::ensure!(
        dir.join("root.pem").exists(),
        "{} holds no CA: `stoq ca serve --dir` makes one",
        args.place.dir.display()
    );
    let serials = match LocalCa::open(&dir, LocalCaConfig::default()) {
        Ok(ca) => {
            let serials = ca.revoke(&names)?;
            ca.revocation_list()?;
            serials
        }
        // Whoever serves does it.
        Err(CertsError::DirectoryLocked { .. }) => {
            let orders = RevocationDirectory::open(&args.place.dir.join("revocations"))?;
            orders.revoke(&names, REVOCATION_PATIENCE)?
        }
        Err(error) => return Err(error.into()),
    };
    if args.place.json {
        return output::json_line(&json!({ "revoked": serials }));
    }
    anyhow::ensure!(!serials.is_empty(), "no valid certificate carries exactly these names");
    println!("revoked: {}", serials.join(", "));
    Ok(())
}

impl Names {
    fn parse(&self) -> anyhow::Result<IdentityNames> {
        let mut names = crate::tls::add_names(IdentityNames::new(), &self.names)?;
        if let Some(id) = &self.client_id {
            names = names.with_client_id(id)?;
        }
        names.validate().context("--names, --client-id")?;
        Ok(names)
    }
}

fn make_directory(path: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.with_context(|| format!("making {}", path.display()))
}

fn prefix(text: &str) -> anyhow::Result<(Ipv6Addr, u8)> {
    let parsed = text
        .split_once('/')
        .and_then(|(address, length)| Some((address.parse().ok()?, length.parse().ok()?)));
    parsed
        .filter(|(_, length)| *length <= 128)
        .with_context(|| format!("`{text}` is no IPv6 prefix such as 2001:db8::/32"))
}
