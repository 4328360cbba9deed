//! Certificate requests (PKCS#10, RFC 2986), checked before a CA signs: proof of possession, an
//! allowed key, and no wish beyond the entitlement.

use std::net::Ipv6Addr;

use aws_lc_rs::signature::{ML_DSA_65, UnparsedPublicKey};
use rcgen::string::Ia5String;
use rcgen::{
    CertificateSigningRequestParams, IsCa, PublicKey, PublicKeyData, SanType, SignatureAlgorithm,
};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::FromDer;

use super::authority::{self, CertificateRequest};
use super::error::CaError;

/// RFC 9881: the same identifier for the key and for the signature.
const ML_DSA_65_OID: &str = "2.16.840.1.101.3.4.3.18";

/// The key of a request that proved its possession.
pub(super) enum RequestedKey {
    Classical(PublicKey),
    MlDsa(Vec<u8>),
}

impl PublicKeyData for RequestedKey {
    fn der_bytes(&self) -> &[u8] {
        match self {
            Self::Classical(key) => key.der_bytes(),
            Self::MlDsa(key) => key,
        }
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        match self {
            Self::Classical(key) => PublicKeyData::algorithm(key),
            Self::MlDsa(_) => &rcgen::PKCS_ML_DSA_65,
        }
    }
}

/// What a request asks for.
struct Wish {
    key: RequestedKey,
    names: Vec<SanType>,
    is_ca: bool,
}

/// The key to certify, if the request may be granted.
pub(super) fn check_request(request: &CertificateRequest<'_>) -> Result<RequestedKey, CaError> {
    let (rest, parsed) =
        X509CertificationRequest::from_der(request.csr).map_err(CaError::invalid)?;
    if !rest.is_empty() {
        return Err(CaError::invalid("bytes follow the request"));
    }
    let wish = match parsed.signature_algorithm.algorithm.to_id_string().as_str() {
        ML_DSA_65_OID => read_ml_dsa(&parsed)?,
        _ => read_classical(request)?,
    };
    if wish.is_ca {
        return Err(CaError::refused("the request asks for a CA certificate"));
    }
    let entitled = authority::alternative_names(request.names).map_err(CaError::invalid)?;
    match wish.names.iter().find(|name| !entitled.contains(name)) {
        Some(name) => Err(CaError::refused(format!("the requester is not entitled to {name:?}"))),
        None => Ok(wish.key),
    }
}

fn read_classical(request: &CertificateRequest<'_>) -> Result<Wish, CaError> {
    let parsed =
        CertificateSigningRequestParams::from_der(request.csr).map_err(CaError::invalid)?;
    let allowed =
        [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519];
    if !allowed.contains(&parsed.public_key.algorithm()) {
        return Err(CaError::refused(
            "only ECDSA P-256, P-384, Ed25519 and ML-DSA-65 keys are certified",
        ));
    }
    Ok(Wish {
        key: RequestedKey::Classical(parsed.public_key),
        names: parsed.params.subject_alt_names,
        is_ca: matches!(parsed.params.is_ca, IsCa::Ca(_)),
    })
}

fn read_ml_dsa(request: &X509CertificationRequest<'_>) -> Result<Wish, CaError> {
    let info = &request.certification_request_info;
    if info.subject_pki.algorithm.algorithm.to_id_string() != ML_DSA_65_OID {
        return Err(CaError::invalid("the request is signed by another kind of key than its own"));
    }
    let key = info.subject_pki.subject_public_key.data.to_vec();
    UnparsedPublicKey::new(&ML_DSA_65, &key)
        .verify(info.raw, &request.signature_value.data)
        .map_err(|_| CaError::invalid("the request is not signed by its own key"))?;
    let mut wish = Wish { key: RequestedKey::MlDsa(key), names: Vec::new(), is_ca: false };
    for extension in request.requested_extensions().into_iter().flatten() {
        match extension {
            ParsedExtension::SubjectAlternativeName(names) => {
                for name in &names.general_names {
                    wish.names.push(alternative_name(name)?);
                }
            }
            ParsedExtension::BasicConstraints(constraints) => wish.is_ca |= constraints.ca,
            // The CA has uses of its own for every key.
            ParsedExtension::KeyUsage(_) | ParsedExtension::ExtendedKeyUsage(_) => {}
            _ => return Err(CaError::invalid("the request has an unknown extension")),
        }
    }
    Ok(wish)
}

fn alternative_name(name: &GeneralName<'_>) -> Result<SanType, CaError> {
    let ia5 = |text: &str| Ia5String::try_from(text).map_err(CaError::invalid);
    match name {
        GeneralName::DNSName(name) => Ok(SanType::DnsName(ia5(name)?)),
        GeneralName::URI(uri) => Ok(SanType::URI(ia5(uri)?)),
        GeneralName::IPAddress(bytes) => <[u8; 16]>::try_from(*bytes)
            .map(|address| SanType::IpAddress(Ipv6Addr::from(address).into()))
            .map_err(|_| CaError::refused("only IPv6 addresses are certified")),
        other => Err(CaError::refused(format!("names such as {other} are not certified"))),
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams};
    use rustls_pki_types::CertificateSigningRequestDer;

    use super::super::keys::{KeyAlgorithm, PrivateKey};
    use super::super::names::IdentityNames;
    use super::*;

    fn names() -> IdentityNames {
        let names = IdentityNames::new().with_dns("node.example.net").unwrap();
        names.with_ipv6("2001:db8::1".parse().unwrap()).with_client_id("probe-7").unwrap()
    }

    fn check(csr: &CertificateSigningRequestDer<'static>) -> Result<RequestedKey, CaError> {
        check_request(&CertificateRequest { csr, names: &names() })
    }

    fn request(
        change: impl FnOnce(&mut CertificateParams),
    ) -> CertificateSigningRequestDer<'static> {
        let key = PrivateKey::generate(KeyAlgorithm::MlDsa65).unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = authority::alternative_names(&names()).unwrap();
        change(&mut params);
        params.serialize_request(&key).unwrap().der().clone()
    }

    #[test]
    fn ml_dsa_requests_are_checked_like_others() {
        let good = request(|_| {});
        assert_eq!(check(&good).unwrap().der_bytes().len(), 1952);
        check(&request(|params| params.subject_alt_names.truncate(1))).unwrap();
        let refused = |csr: &CertificateSigningRequestDer<'static>| match check(csr) {
            Err(CaError::Refused { reason }) => reason,
            other => panic!("{:?}", other.map(drop)),
        };
        let ca = |params: &mut CertificateParams| {
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        };
        assert!(refused(&request(ca)).contains("CA certificate"));
        let greedy = |name: SanType| request(|params| params.subject_alt_names.push(name));
        let dns = |name: &str| SanType::DnsName(Ia5String::try_from(name).unwrap());
        assert!(refused(&greedy(dns("bank.example"))).contains("not entitled"));
        let v4 = SanType::IpAddress("192.0.2.1".parse().unwrap());
        assert!(refused(&greedy(v4)).contains("only IPv6"));
        let mail = SanType::Rfc822Name(Ia5String::try_from("a@example.net").unwrap());
        assert!(refused(&greedy(mail)).contains("not certified"));
    }

    #[test]
    fn ml_dsa_requests_prove_possession() {
        let good = request(|_| {});
        let mut longer = good.as_ref().to_vec();
        longer.push(0);
        assert!(matches!(check(&longer.into()), Err(CaError::InvalidRequest { .. })));
        // Every change is noticed: in the names, in the key, in the signature.
        for place in (0..good.len()).step_by(97) {
            let mut forged = good.as_ref().to_vec();
            forged[place] ^= 1;
            assert!(check(&forged.into()).is_err(), "byte {place}");
        }
    }
}
