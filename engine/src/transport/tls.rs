//! TLS of a transport from the `[tls]` table.

use std::sync::Arc;

use quinn_proto::crypto;

use crate::certs::{
    CertsError, ClientAuth, ClientTls, FaultCounters, IdentityNames, MaintenanceThread,
    RotatingIdentity, ServerTls, SystemWallClock, TrustStore,
};
use crate::config::{ConfigError, TlsConfig, TransportConfig};
use crate::error::StartError;

/// Both sides, as far as the table names them.
pub(super) struct BuiltTls {
    pub(super) server: Option<Arc<dyn crypto::ServerConfig>>,
    pub(super) client: Option<Arc<dyn crypto::ClientConfig>>,
    pub(super) identity: Option<Arc<RotatingIdentity>>,
    pub(super) maintenance: Vec<MaintenanceThread>,
    /// What to export, and whose it is.
    pub(super) faults: Vec<(&'static str, Arc<FaultCounters>)>,
}

pub(super) fn build(config: &TransportConfig) -> Result<BuiltTls, StartError> {
    let Some(tls) = &config.tls else {
        return Err(StartError::Config(ConfigError {
            key: "tls",
            value: "unset".into(),
            allowed: "a table with alpn and an identity or roots (or StoqTransport::with_tls)"
                .into(),
        }));
    };
    let refused = |error: CertsError| StartError::Tls(error.to_string());
    let identity = identity(tls).map_err(refused)?;
    let trust = trust(tls).map_err(refused)?;
    let mut built = BuiltTls {
        server: None,
        client: None,
        identity: identity.clone(),
        maintenance: Vec::new(),
        faults: Vec::new(),
    };
    built.faults.extend(trust.iter().map(|trust| ("trust", trust.faults().clone())));
    if let Some(identity) = &identity {
        let auth = match &trust {
            Some(trust) if tls.client_certificates => ClientAuth::Required(trust.clone()),
            _ => ClientAuth::default(),
        };
        let server = ServerTls::builder()
            .alpn(tls.alpn.clone())
            .identity(identity.clone())
            .client_auth(auth)
            .require_post_quantum(tls.require_post_quantum)
            .early_data(config.zero_rtt)
            .packet_crypto(config.crypto_provider)
            .key_log(tls.key_log)
            .build()
            .map_err(refused)?;
        built.maintenance.push(server.spawn_maintenance().map_err(refused)?);
        built.faults.push(("server", server.faults().clone()));
        built.server = Some(server.crypto());
    }
    if let Some(trust) = trust {
        let mut client = ClientTls::builder()
            .alpn(tls.alpn.clone())
            .trust(trust)
            .require_post_quantum(tls.require_post_quantum)
            .early_data(config.zero_rtt)
            .packet_crypto(config.crypto_provider)
            .key_log(tls.key_log);
        if let Some(identity) = identity {
            client = client.identity(identity);
        }
        let client = client.build().map_err(refused)?;
        built.maintenance.push(client.spawn_maintenance().map_err(refused)?);
        built.faults.push(("client", client.faults().clone()));
        built.client = Some(client.crypto());
    }
    Ok(built)
}

fn identity(tls: &TlsConfig) -> Result<Option<Arc<RotatingIdentity>>, CertsError> {
    let clock = Arc::new(SystemWallClock);
    let builder = match (&tls.certificate, &tls.key) {
        (Some(certificate), Some(key)) => RotatingIdentity::from_pem_files(certificate, key),
        _ if tls.self_signed.is_empty() => return Ok(None),
        _ => {
            let mut names = IdentityNames::new();
            for name in tls.self_signed_names() {
                names = match name {
                    Ok(address) => names.with_ipv6(address),
                    Err(dns) => names.with_dns(dns)?,
                };
            }
            RotatingIdentity::self_signed(names)
        }
    };
    builder.clock(clock).start().map(Some)
}

fn trust(tls: &TlsConfig) -> Result<Option<Arc<TrustStore>>, CertsError> {
    tls.roots.as_ref().map(|roots| TrustStore::builder().roots_pem(roots).build()).transpose()
}
