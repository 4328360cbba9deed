//! The messages of `trustchain/1`, byte for byte.
//!
//! ```text
//! frame    = length u32 │ body                      length of the body, at most 64 KiB, of a list 1 MiB
//! enrol    = 1 u8 │ token bytes16 │ csr bytes16     first certificate, one-time token
//! renew    = 2 u8 │ csr bytes16                     authenticated by the current certificate
//! issued   = 3 u8 │ count u8 │ count × bytes16      chain, leaf first
//! refused  = 4 u8 │ code u8 │ reason bytes16        reason in UTF-8
//! keys     = 5 u8                                   the service's shared secret, please
//! secret   = 6 u8 │ secret bytes16                  for those whose certificates have the same names
//! list     = 7 u8                                   the CA's revocation list, please
//! revoked  = 8 u8 │ list bytes32                    RFC 5280, DER; empty if the CA has none
//! bytes16  = length u16 │ bytes
//! bytes32  = length u32 │ bytes
//! ```
//!
//! Integers are big-endian. A body holds exactly one message: bytes after it are an error. The
//! version is in the application protocol (ALPN), so messages carry none.

/// Largest body of any message but a revocation list.
pub const BODY_SIZE_BYTES_MAX: usize = 64 * 1024;
/// Largest body of an answer: a list of as many revocations as an embedded CA remembers.
pub const ANSWER_SIZE_BYTES_MAX: usize = 1024 * 1024;
/// Most certificates in a chain.
const CHAIN_LENGTH_MAX: usize = 8;
const LENGTH_SIZE_BYTES: usize = 4;

const ENROL: u8 = 1;
const RENEW: u8 = 2;
const ISSUED: u8 = 3;
const REFUSED: u8 = 4;
const KEYS: u8 = 5;
const SECRET: u8 = 6;
const LIST: u8 = 7;
const REVOKED: u8 = 8;

/// One message of either direction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Asks for the first certificate.
    Enrol {
        /// The one-time token.
        token: Vec<u8>,
        /// PKCS#10 request, DER.
        csr: Vec<u8>,
    },
    /// Asks for the next certificate of the identity that the connection is authenticated as.
    Renew {
        /// PKCS#10 request, DER.
        csr: Vec<u8>,
    },
    /// The certificate.
    Issued {
        /// DER certificates, leaf first.
        chain: Vec<Vec<u8>>,
    },
    /// Asks for the secret that all machines with the same names share; authenticated as a renewal.
    Keys,
    /// The secret.
    Secret {
        /// For [`SharedKeys::from_secret`](crate::certs::SharedKeys::from_secret).
        secret: Vec<u8>,
    },
    /// Asks for the current revocation list; anybody may.
    List,
    /// The revocation list.
    Revoked {
        /// DER (RFC 5280, section 5); empty if the CA keeps none.
        list: Vec<u8>,
    },
    /// No certificate.
    Refused {
        /// What kind of refusal.
        code: RefusalCode,
        /// In words.
        reason: String,
    },
}

/// Kinds of refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum RefusalCode {
    /// Try again later.
    Unavailable,
    /// Policy says no.
    Refused,
    /// The request is broken.
    Invalid,
    /// The connection is not authenticated by a current certificate.
    Unauthorized,
    /// The token certified somebody already.
    TokenSpent,
    /// The token is unknown or expired.
    TokenInvalid,
}

impl RefusalCode {
    const ALL: [(Self, u8); 6] = [
        (Self::Unavailable, 1),
        (Self::Refused, 2),
        (Self::Invalid, 3),
        (Self::Unauthorized, 4),
        (Self::TokenSpent, 5),
        (Self::TokenInvalid, 6),
    ];

    fn to_byte(self) -> u8 {
        let found = Self::ALL.iter().find(|(code, _)| *code == self);
        found.expect("every code has a byte").1
    }

    fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.iter().find(|(_, value)| *value == byte).map(|(code, _)| *code)
    }
}

/// Why bytes are no message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    /// A length points past the end.
    #[error("the trustchain message ends early")]
    Truncated,
    /// A frame or field is larger than allowed.
    #[error("the trustchain message is larger than allowed")]
    TooLarge,
    /// Bytes after the message.
    #[error("bytes follow the trustchain message")]
    Trailing,
    /// An unknown type, code or text that is not UTF-8.
    #[error("the trustchain message has an unknown type, code or encoding")]
    Unknown,
}

impl Message {
    /// The framed message.
    ///
    /// # Errors
    /// [`CodecError::TooLarge`] if a field or the whole exceeds its limit.
    pub fn encode(&self) -> Result<Vec<u8>, CodecError> {
        let mut out = vec![0; LENGTH_SIZE_BYTES];
        match self {
            Self::Enrol { token, csr } => {
                out.push(ENROL);
                put_bytes16(&mut out, token)?;
                put_bytes16(&mut out, csr)?;
            }
            Self::Renew { csr } => {
                out.push(RENEW);
                put_bytes16(&mut out, csr)?;
            }
            Self::Issued { chain } => {
                if chain.len() > CHAIN_LENGTH_MAX {
                    return Err(CodecError::TooLarge);
                }
                out.push(ISSUED);
                out.push(chain.len() as u8);
                for certificate in chain {
                    put_bytes16(&mut out, certificate)?;
                }
            }
            Self::Keys => out.push(KEYS),
            Self::List => out.push(LIST),
            Self::Revoked { list } => {
                out.push(REVOKED);
                let length = u32::try_from(list.len()).map_err(|_| CodecError::TooLarge)?;
                out.extend(length.to_be_bytes());
                out.extend_from_slice(list);
            }
            Self::Secret { secret } => {
                out.push(SECRET);
                put_bytes16(&mut out, secret)?;
            }
            Self::Refused { code, reason } => {
                out.extend([REFUSED, code.to_byte()]);
                put_bytes16(&mut out, reason.as_bytes())?;
            }
        }
        let body_size_bytes = out.len() - LENGTH_SIZE_BYTES;
        let size_bytes_max = match self {
            Self::Revoked { .. } => ANSWER_SIZE_BYTES_MAX,
            _ => BODY_SIZE_BYTES_MAX,
        };
        if body_size_bytes > size_bytes_max {
            return Err(CodecError::TooLarge);
        }
        out[..LENGTH_SIZE_BYTES].copy_from_slice(&(body_size_bytes as u32).to_be_bytes());
        Ok(out)
    }

    /// Whether a framed message is a request that a certificate would not help, and that must not
    /// fail because the certificate has expired.
    pub(crate) fn is_anonymous(frame: &[u8]) -> bool {
        matches!(frame.get(LENGTH_SIZE_BYTES), Some(&(ENROL | LIST)))
    }

    /// Reads the body of a frame.
    ///
    /// # Errors
    /// The body is anything but exactly one message.
    pub fn decode(body: &[u8]) -> Result<Self, CodecError> {
        let mut rest = body;
        let message = match take_u8(&mut rest)? {
            ENROL => Self::Enrol {
                token: take_bytes16(&mut rest)?.to_vec(),
                csr: take_bytes16(&mut rest)?.to_vec(),
            },
            RENEW => Self::Renew { csr: take_bytes16(&mut rest)?.to_vec() },
            ISSUED => {
                let count = usize::from(take_u8(&mut rest)?);
                if count > CHAIN_LENGTH_MAX {
                    return Err(CodecError::TooLarge);
                }
                let mut chain = Vec::with_capacity(count);
                for _ in 0..count {
                    chain.push(take_bytes16(&mut rest)?.to_vec());
                }
                Self::Issued { chain }
            }
            REFUSED => Self::Refused {
                code: RefusalCode::from_byte(take_u8(&mut rest)?).ok_or(CodecError::Unknown)?,
                reason: String::from_utf8(take_bytes16(&mut rest)?.to_vec())
                    .map_err(|_| CodecError::Unknown)?,
            },
            KEYS => Self::Keys,
            LIST => Self::List,
            REVOKED => Self::Revoked { list: take_bytes32(&mut rest)?.to_vec() },
            SECRET => Self::Secret { secret: take_bytes16(&mut rest)?.to_vec() },
            _ => return Err(CodecError::Unknown),
        };
        if rest.is_empty() { Ok(message) } else { Err(CodecError::Trailing) }
    }
}

fn put_bytes16(out: &mut Vec<u8>, bytes: &[u8]) -> Result<(), CodecError> {
    let length = u16::try_from(bytes.len()).map_err(|_| CodecError::TooLarge)?;
    out.extend(length.to_be_bytes());
    out.extend_from_slice(bytes);
    Ok(())
}

fn take_u8(rest: &mut &[u8]) -> Result<u8, CodecError> {
    let (first, tail) = rest.split_first().ok_or(CodecError::Truncated)?;
    *rest = tail;
    Ok(*first)
}

fn take_bytes16<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8], CodecError> {
    let (length, tail) = rest.split_first_chunk::<2>().ok_or(CodecError::Truncated)?;
    let length = usize::from(u16::from_be_bytes(*length));
    let (bytes, tail) = tail.split_at_checked(length).ok_or(CodecError::Truncated)?;
    *rest = tail;
    Ok(bytes)
}

fn take_bytes32<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8], CodecError> {
    let (length, tail) = rest.split_first_chunk::<4>().ok_or(CodecError::Truncated)?;
    let length = u32::from_be_bytes(*length) as usize;
    let (bytes, tail) = tail.split_at_checked(length).ok_or(CodecError::Truncated)?;
    *rest = tail;
    Ok(bytes)
}

/// Collects one frame from a stream, however it is cut.
#[derive(Debug)]
pub struct FrameReader {
    bytes: Vec<u8>,
    body_size_bytes_max: usize,
}

impl Default for FrameReader {
    /// A reader of requests: up to [`BODY_SIZE_BYTES_MAX`].
    fn default() -> Self {
        Self { bytes: Vec::new(), body_size_bytes_max: BODY_SIZE_BYTES_MAX }
    }
}

impl FrameReader {
    /// A reader of answers: up to [`ANSWER_SIZE_BYTES_MAX`].
    #[must_use]
    pub fn of_answers() -> Self {
        Self { body_size_bytes_max: ANSWER_SIZE_BYTES_MAX, ..Self::default() }
    }

    /// Takes the next bytes of the stream; the message once it is whole.
    ///
    /// # Errors
    /// The frame is too large, followed by other bytes, or no message. The stream is of no more
    /// use then.
    pub fn handle_bytes(&mut self, bytes: &[u8]) -> Result<Option<Message>, CodecError> {
        // Checked before taking, so that a peer cannot make this grow.
        if self.bytes.len() + bytes.len() > LENGTH_SIZE_BYTES + self.body_size_bytes_max {
            return Err(CodecError::TooLarge);
        }
        self.bytes.extend_from_slice(bytes);
        let Some((length, body)) = self.bytes.split_first_chunk::<LENGTH_SIZE_BYTES>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*length) as usize;
        if length > self.body_size_bytes_max {
            return Err(CodecError::TooLarge);
        }
        match body.len().cmp(&length) {
            std::cmp::Ordering::Less => Ok(None),
            std::cmp::Ordering::Equal => Message::decode(body).map(Some),
            std::cmp::Ordering::Greater => Err(CodecError::Trailing),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn samples() -> Vec<Message> {
        vec![
            Message::Enrol { token: vec![1; 32], csr: vec![2; 300] },
            Message::Enrol { token: Vec::new(), csr: Vec::new() },
            Message::Renew { csr: vec![3; 300] },
            Message::Keys,
            Message::Secret { secret: vec![5; 64] },
            Message::List,
            Message::Revoked { list: vec![6; 500] },
            Message::Revoked { list: Vec::new() },
            Message::Issued { chain: vec![vec![4; 700], Vec::new()] },
            Message::Issued { chain: Vec::new() },
            Message::Refused { code: RefusalCode::Unauthorized, reason: "näh".to_owned() },
        ]
    }

    #[test]
    fn messages_round_trip_in_any_pieces() {
        for message in samples() {
            let frame = message.encode().unwrap();
            let anonymous = matches!(message, Message::Enrol { .. } | Message::List);
            assert_eq!(Message::is_anonymous(&frame), anonymous);
            for piece in [1, 2, 3, 7, frame.len()] {
                let mut reader = FrameReader::default();
                let mut found = None;
                for chunk in frame.chunks(piece) {
                    assert_eq!(found, None, "complete before its end");
                    found = reader.handle_bytes(chunk).unwrap();
                }
                assert_eq!(found.as_ref(), Some(&message));
            }
        }
    }

    #[test]
    fn cut_and_extended_bodies_are_refused() {
        for message in samples() {
            let frame = message.encode().unwrap();
            let body = &frame[LENGTH_SIZE_BYTES..];
            for length in 0..body.len() {
                assert_eq!(Message::decode(&body[..length]), Err(CodecError::Truncated));
            }
            let mut longer = body.to_vec();
            longer.push(0);
            assert_eq!(Message::decode(&longer), Err(CodecError::Trailing));
            let mut reader = FrameReader::default();
            let mut more = frame.clone();
            more.push(0);
            assert_eq!(reader.handle_bytes(&more), Err(CodecError::Trailing));
        }
    }

    #[test]
    fn limits_hold() {
        let too_long = Message::Renew { csr: vec![0; 65_536] };
        assert_eq!(too_long.encode(), Err(CodecError::TooLarge));
        let wide = Message::Issued { chain: vec![Vec::new(); CHAIN_LENGTH_MAX + 1] };
        assert_eq!(wide.encode(), Err(CodecError::TooLarge));
        let heavy = Message::Issued { chain: vec![vec![0; 40_000]; 2] };
        assert_eq!(heavy.encode(), Err(CodecError::TooLarge));
        let long_list = Message::Revoked { list: vec![0; ANSWER_SIZE_BYTES_MAX] };
        assert_eq!(long_list.encode(), Err(CodecError::TooLarge));
        let list = Message::Revoked { list: vec![0; ANSWER_SIZE_BYTES_MAX - 5] };
        let frame = list.encode().unwrap();
        assert_eq!(FrameReader::of_answers().handle_bytes(&frame), Ok(Some(list)));
        assert_eq!(FrameReader::default().handle_bytes(&frame), Err(CodecError::TooLarge));
        assert_eq!(Message::decode(&[ISSUED, 9]), Err(CodecError::TooLarge));
        assert_eq!(Message::decode(&[9]), Err(CodecError::Unknown));
        assert_eq!(Message::decode(&[REFUSED, 9, 0, 0]), Err(CodecError::Unknown));
        assert_eq!(Message::decode(&[REFUSED, 1, 0, 1, 0xff]), Err(CodecError::Unknown));
        let announced = (BODY_SIZE_BYTES_MAX as u32 + 1).to_be_bytes();
        assert_eq!(FrameReader::default().handle_bytes(&announced), Err(CodecError::TooLarge));
        let flood = vec![0xff; BODY_SIZE_BYTES_MAX + LENGTH_SIZE_BYTES + 1];
        assert_eq!(FrameReader::default().handle_bytes(&flood), Err(CodecError::TooLarge));
    }

    proptest! {
        #[test]
        fn whatever_decodes_encodes_to_itself(body in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(message) = Message::decode(&body) {
                prop_assert_eq!(&message.encode().unwrap()[LENGTH_SIZE_BYTES..], &body[..]);
            }
        }
    }
}
