//! Kernel TLS: after a handshake by rustls, the kernel seals and opens the records of a TCP socket
//! (`TCP_ULP` `tls`, Linux 4.13; TLS 1.3 both ways, 5.1; CONFIG_TLS).
//!
//! Nothing but application data may follow the handshake: no session tickets are sent, and the client
//! waits for the server's first byte, so that neither side's rustls holds bytes that the kernel needs.

use std::net::TcpStream;

use anyhow::Context;
use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use rustls::{ConnectionTrafficSecrets, ExtractedSecrets};

/// Bytes of an AES-GCM nonce that the kernel calls salt: the first ones.
const SALT_BYTES: usize = 4;

/// Gives a connected socket's records to the kernel's TLS, which has no keys yet; why not, where the
/// kernel has none.
///
/// # Errors
/// The kernel refuses for another reason than that it cannot at all.
pub fn attach(socket: &TcpStream) -> anyhow::Result<Result<(), String>> {
    match setsockopt(socket, sockopt::TcpUlp::default(), b"tls") {
        Ok(()) => Ok(Ok(())),
        Err(error @ (Errno::ENOENT | Errno::ENOPROTOOPT)) => Ok(Err(format!(
            "this kernel has no TLS: it needs CONFIG_TLS, as a module `modprobe tls` \
             (setsockopt(TCP_ULP, tls): {error})"
        ))),
        Err(error) => Err(error).context("setsockopt(TCP_ULP, tls)"),
    }
}

/// Gives the kernel both directions' keys.
///
/// # Errors
/// The cipher is not AES-128-GCM, or the kernel refuses the keys.
pub fn set_keys(socket: &TcpStream, secrets: ExtractedSecrets) -> anyhow::Result<()> {
    setsockopt(socket, sockopt::TcpTlsTx, &crypto_info(secrets.tx)?).context("TLS_TX")?;
    setsockopt(socket, sockopt::TcpTlsRx, &crypto_info(secrets.rx)?).context("TLS_RX")
}

fn crypto_info(
    (sequence, secrets): (u64, ConnectionTrafficSecrets),
) -> anyhow::Result<sockopt::TlsCryptoInfo> {
    let ConnectionTrafficSecrets::Aes128Gcm { key, iv } = secrets else {
        anyhow::bail!("kernel TLS is set up for AES-128-GCM only");
    };
    let (salt, iv) = iv.as_ref().split_at(SALT_BYTES);
    Ok(sockopt::TlsCryptoInfo::Aes128Gcm(libc::tls12_crypto_info_aes_gcm_128 {
        info: libc::tls_crypto_info {
            version: libc::TLS_1_3_VERSION,
            cipher_type: libc::TLS_CIPHER_AES_GCM_128,
        },
        iv: iv.try_into().context("the nonce has 12 bytes")?,
        key: key.as_ref().try_into().context("the key has 16 bytes")?,
        salt: salt.try_into().context("the nonce has 12 bytes")?,
        rec_seq: sequence.to_be_bytes(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both ends' secrets after a handshake in memory.
    fn handshake() -> (ExtractedSecrets, ExtractedSecrets) {
        let mut config = crate::client_tls().expect("rustls");
        config.enable_secret_extraction = true;
        let name = "localhost".try_into().expect("a name");
        let mut client = rustls::ClientConnection::new(config.into(), name).expect("rustls");
        let mut config = crate::server_tls().expect("rustls");
        config.enable_secret_extraction = true;
        config.send_tls13_tickets = 0;
        let mut server = rustls::ServerConnection::new(config.into()).expect("rustls");
        while client.is_handshaking() || server.is_handshaking() {
            let mut flight = Vec::new();
            client.write_tls(&mut flight).expect("into memory");
            server.read_tls(&mut &flight[..]).expect("from memory");
            server.process_new_packets().expect("valid");
            flight.clear();
            server.write_tls(&mut flight).expect("into memory");
            client.read_tls(&mut &flight[..]).expect("from memory");
            client.process_new_packets().expect("valid");
        }
        let secrets = (client.dangerous_extract_secrets(), server.dangerous_extract_secrets());
        (secrets.0.expect("extraction is on"), secrets.1.expect("extraction is on"))
    }

    #[test]
    fn what_one_end_seals_with_the_other_opens_with() {
        let (client, server) = handshake();
        let fields = |secrets| match crypto_info(secrets).expect("AES-128-GCM") {
            sockopt::TlsCryptoInfo::Aes128Gcm(info) => {
                assert_eq!(info.info.version, 0x0304);
                (info.salt, info.iv, info.key, info.rec_seq)
            }
            other => panic!("{other:?}"),
        };
        let (upward, downward) = (fields(client.tx), fields(server.tx));
        assert_eq!(upward, fields(server.rx));
        assert_eq!(downward, fields(client.rx));
        assert!(upward.2 != downward.2 && upward.3 == [0; 8]);
    }

    #[test]
    fn other_ciphers_are_refused() {
        use rustls::crypto::cipher::{AeadKey, Iv};
        let (key, iv) = (AeadKey::from([7; 32]), Iv::from([0; 12]));
        let secrets = ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv };
        assert!(crypto_info((1, secrets)).is_err());
    }

    #[test]
    fn a_kernel_either_has_it_or_says_why_not() {
        let listener = std::net::TcpListener::bind("[::1]:0").expect("loopback");
        let socket = TcpStream::connect(listener.local_addr().expect("bound")).expect("listens");
        let available = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_available_ulp");
        let attached = attach(&socket).expect("an answer");
        // A module that is not loaded yet is not in the list, and loads by being asked for.
        if available.is_ok_and(|text| text.split_whitespace().any(|ulp| ulp == "tls")) {
            assert_eq!(attached, Ok(()));
        } else if let Err(why) = attached {
            assert!(why.contains("CONFIG_TLS"), "{why}");
        }
    }
}
