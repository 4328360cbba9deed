//! Address validation tokens (RFC 9000 §8.1) that are good once, whichever shard sees them.
//!
//! Every shard opens every other's tokens: they share the key. What they also share is a filter of
//! the tokens that were used. It never waits: a token is two words of randomness that we chose, one
//! of which picks a 64-bit word of the filter and the other four bits in it; setting them is one
//! atomic operation, and whoever finds all of them set has a token that was used before (or, rarely,
//! looks like one: then the client is asked for its address once more). Of several shards that see
//! one token at the same time exactly one is first.
//!
//! Memory is bounded: two filters, each for one lifetime of a token. The elder is dropped when time
//! has moved on; by then its tokens have expired.
//!
//! quinn-proto asks a [`TokenLog`] about tokens of NEW_TOKEN frames only. Those of Retry packets are
//! noticed where they are opened ([`OnceKey`]).

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use quinn_proto::crypto::{AeadKey, CryptoError, HandshakeTokenKey};
use quinn_proto::{TokenLog, TokenMemoryCache, TokenReuseError, TokenStore};

use crate::config::USED_TOKENS_FILTER_WORDS;

/// How long a Retry token is accepted: quinn-proto's default.
pub(crate) const RETRY_TOKEN_LIFETIME: Duration = Duration::from_secs(15);
/// First octet of an opened Retry token, as quinn-proto writes it.
const RETRY_TOKEN: u8 = 0;

/// What the shards of an engine share about tokens.
#[derive(Clone)]
pub(crate) struct Tokens {
    /// Used tokens of NEW_TOKEN frames.
    pub(crate) log: Arc<UsedTokens>,
    /// Used tokens of Retry packets.
    pub(crate) retries: Arc<UsedTokens>,
    /// The client's own, for its next connections.
    pub(crate) store: Arc<dyn TokenStore>,
}

impl Default for Tokens {
    fn default() -> Self {
        Self {
            log: Arc::default(),
            retries: Arc::default(),
            store: Arc::new(TokenMemoryCache::default()),
        }
    }
}

/// One lifetime's used tokens: a Bloom filter whose items keep to one word each. Its memory is taken
/// with the first token.
#[derive(Default)]
struct Filter(OnceLock<Box<[AtomicU64]>>);

impl Filter {
    fn words(&self) -> &[AtomicU64] {
        self.0.get_or_init(|| (0..USED_TOKENS_FILTER_WORDS).map(|_| AtomicU64::new(0)).collect())
    }

    /// The token's word and its bits there. Tokens are authenticated: nobody chooses these.
    fn place(nonce: u128) -> (usize, u64) {
        let bits = (0..4).fold(0, |bits, index| bits | 1 << ((nonce >> (64 + 6 * index)) & 63));
        ((nonce as u64) as usize % USED_TOKENS_FILTER_WORDS, bits)
    }

    fn contains(&self, nonce: u128) -> bool {
        let (word, bits) = Self::place(nonce);
        // Relaxed: the word is all there is to know.
        self.0.get().is_some_and(|words| words[word].load(Relaxed) & bits == bits)
    }

    /// Whether the token was not there before.
    fn insert(&self, nonce: u128) -> bool {
        let (word, bits) = Self::place(nonce);
        // Relaxed: all changes of one word have one order, in which one insertion is the first.
        self.words()[word].fetch_or(bits, Relaxed) & bits != bits
    }
}

/// Two consecutive periods of time.
struct Periods {
    first: u64,
    filters: [Arc<Filter>; 2],
}

/// The tokens that were used, as far as they have not expired.
pub(crate) struct UsedTokens(ArcSwap<Periods>);

impl Default for UsedTokens {
    fn default() -> Self {
        Self(ArcSwap::from_pointee(Periods { first: 0, filters: Default::default() }))
    }
}

impl UsedTokens {
    /// Notes the use of a token in `period`; false: it was used before, in this or a neighbouring
    /// period, or the period is over.
    fn use_once(&self, nonce: u128, period: u64) -> bool {
        if self.0.load().first + 1 < period {
            self.0.rcu(|now| Self::advanced(now, period));
        }
        let periods = self.0.load();
        match period.checked_sub(periods.first) {
            Some(0) => !periods.filters[1].contains(nonce) && periods.filters[0].insert(nonce),
            Some(1) => !periods.filters[0].contains(nonce) && periods.filters[1].insert(nonce),
            _ => false,
        }
    }

    /// `period` becomes the younger one; a filter that still counts is kept.
    fn advanced(now: &Periods, period: u64) -> Periods {
        if now.first + 1 >= period {
            return Periods { first: now.first, filters: now.filters.clone() };
        }
        let elder = match now.first + 2 == period {
            true => now.filters[1].clone(),
            false => Arc::default(),
        };
        Periods { first: period - 1, filters: [elder, Arc::default()] }
    }
}

/// The number of a time's period; times before 1970 are in the first.
fn period_of(time: SystemTime, length: Duration) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_secs() / length.as_secs().max(1)
}

impl TokenLog for UsedTokens {
    fn check_and_insert(
        &self,
        nonce: u128,
        issued: SystemTime,
        lifetime: Duration,
    ) -> Result<(), TokenReuseError> {
        // By the time of expiry: a token belongs to one filter for all its life.
        match self.use_once(nonce, period_of(issued + lifetime, lifetime)) {
            true => Ok(()),
            false => Err(TokenReuseError),
        }
    }
}

/// A token key whose Retry tokens open once.
pub(crate) struct OnceKey {
    pub(crate) inner: Arc<dyn HandshakeTokenKey>,
    pub(crate) used: Arc<UsedTokens>,
}

impl HandshakeTokenKey for OnceKey {
    fn aead_from_hkdf(&self, random_bytes: &[u8]) -> Box<dyn AeadKey> {
        let inner = self.inner.aead_from_hkdf(random_bytes);
        // quinn-proto names each token by 16 random bytes; others would all be new.
        let nonce = random_bytes.try_into().ok().map(u128::from_le_bytes);
        Box::new(OnceAead { inner, nonce, used: self.used.clone() })
    }
}

struct OnceAead {
    inner: Box<dyn AeadKey>,
    nonce: Option<u128>,
    used: Arc<UsedTokens>,
}

impl AeadKey for OnceAead {
    fn seal(&self, data: &mut Vec<u8>, additional_data: &[u8]) -> Result<(), CryptoError> {
        self.inner.seal(data, additional_data)
    }

    fn open<'a>(
        &self,
        data: &'a mut [u8],
        additional_data: &[u8],
    ) -> Result<&'a mut [u8], CryptoError> {
        let opened = self.inner.open(data, additional_data)?;
        if opened.first() == Some(&RETRY_TOKEN)
            && let Some(nonce) = self.nonce
        {
            // By the time of use: a token that comes again later than in the next period has expired.
            let period = period_of(SystemTime::now(), RETRY_TOKEN_LIFETIME);
            if !self.used.use_once(nonce, period) {
                return Err(CryptoError);
            }
        }
        Ok(opened)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::AtomicUsize;

    use rand::{Rng, SeedableRng, rngs::StdRng};

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn check(log: &UsedTokens, nonce: u128, issued_s: u64) -> bool {
        let issued = UNIX_EPOCH + Duration::from_secs(issued_s);
        log.check_and_insert(nonce, issued, HOUR).is_ok()
    }

    #[test]
    fn a_token_is_good_once_until_it_expires() {
        let (log, mut rng) = (UsedTokens::default(), StdRng::seed_from_u64(1));
        let nonces: Vec<u128> = (0..1000).map(|_| rng.random()).collect();
        for (index, nonce) in nonces.iter().enumerate() {
            assert!(check(&log, *nonce, 7200 + index as u64), "token {index} is new");
            assert!(!check(&log, *nonce, 7200 + index as u64), "token {index} was used");
        }
        // An hour later the first ones are still known; two hours later they have expired.
        assert!(check(&log, 1, 10_800));
        assert!(!check(&log, nonces[0], 7200));
        assert!(check(&log, 2, 14_400));
        assert!(!check(&log, nonces[0], 7200), "expired, not forgotten");
        // A gap of many periods leaves nothing behind.
        assert!(check(&log, nonces[0], 1_000_000));
    }

    #[test]
    fn of_many_shards_one_is_first() {
        let (log, tokens) = (Arc::new(UsedTokens::default()), 2000_u64);
        let first = Arc::new(AtomicUsize::new(0));
        let barrier = Arc::new(Barrier::new(4));
        let shards: Vec<_> = (0..4)
            .map(|_| {
                let (log, first, barrier) = (log.clone(), first.clone(), barrier.clone());
                std::thread::spawn(move || {
                    let mut rng = StdRng::seed_from_u64(7);
                    for index in 0..tokens {
                        let nonce: u128 = rng.random();
                        barrier.wait();
                        // Periods move on meanwhile.
                        let period = 100 + index / 300;
                        first.fetch_add(usize::from(log.use_once(nonce, period)), Relaxed);
                    }
                })
            })
            .collect();
        shards.into_iter().for_each(|shard| shard.join().expect("a shard panicked"));
        assert_eq!(first.load(Relaxed) as u64, tokens, "each token once");
    }

    #[test]
    fn retry_tokens_open_once_and_others_as_often_as_asked() {
        let prk = aws_lc_rs::hkdf::Salt::new(aws_lc_rs::hkdf::HKDF_SHA256, &[]).extract(&[1; 32]);
        let key = OnceKey { inner: Arc::new(prk), used: Arc::default() };
        for (kind, expected) in [(RETRY_TOKEN, [true, false, false]), (1, [true, true, true])] {
            let random = [kind + 9; 16];
            let mut sealed = vec![kind, 2, 3];
            key.aead_from_hkdf(&random).seal(&mut sealed, &[]).expect("sealed");
            let opened = expected
                .map(|_| key.aead_from_hkdf(&random).open(&mut sealed.clone(), &[]).is_ok());
            assert_eq!(opened, expected, "kind {kind}");
        }
        let mut forged = vec![0; 40];
        assert!(key.aead_from_hkdf(&[5; 16]).open(&mut forged, &[]).is_err());
    }

    #[test]
    fn a_busy_filter_seldom_takes_a_new_token_for_an_old_one() {
        let (log, mut rng) = (UsedTokens::default(), StdRng::seed_from_u64(3));
        let refused = (0..300_000).filter(|_| !log.use_once(rng.random(), 5)).count();
        assert!(refused < 300, "{refused} of 300000 new tokens were refused");
    }
}
