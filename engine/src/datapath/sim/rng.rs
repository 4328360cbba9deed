//! The simulator's own random numbers.
//!
//! xoshiro256++ (Blackman and Vigna, 2019), its state filled by SplitMix64:
//! published algorithms with published vectors, so that a seed gives the same
//! stream on every machine and with every compiler. Each consumer takes its own
//! numbered stream, so that one more link does not disturb the others.

/// A seeded generator; the same seed and stream give the same numbers everywhere.
#[derive(Debug, Clone)]
pub struct SimRng {
    state: [u64; 4],
}

impl SimRng {
    /// Stream number `stream` of `seed`.
    #[must_use]
    pub fn new(seed: u64, stream: u64) -> Self {
        // The seed is mixed before the stream number enters and mixed again after:
        // neighbouring streams share nothing, and (0, 1) is not (1, 0).
        let mut fill = SplitMix64(SplitMix64(seed).next() ^ stream);
        fill.0 = fill.next();
        Self { state: [fill.next(), fill.next(), fill.next(), fill.next()] }
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        let [s0, s1, s2, s3] = self.state;
        let result = s0.wrapping_add(s3).rotate_left(23).wrapping_add(s0);
        let c = s2 ^ s0;
        let d = s3 ^ s1;
        self.state = [s0 ^ d, s1 ^ c, c ^ (s1 << 17), d.rotate_left(45)];
        result
    }

    /// A number in `0..=max`, uniform to within 2⁻⁶⁴ × `max`.
    pub fn up_to(&mut self, max: u64) -> u64 {
        ((u128::from(self.next_u64()) * (u128::from(max) + 1)) >> 64) as u64
    }

    /// Whether an event of this probability happens. Draws nothing for 0 and 1.
    pub fn chance(&mut self, probability: Probability) -> bool {
        match probability {
            Probability::NEVER => false,
            Probability::ALWAYS => true,
            Probability(threshold) => u128::from(self.next_u64()) < threshold,
        }
    }
}

/// A probability as the integer threshold that 64 random bits are compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Probability(u128);

impl Probability {
    /// Probability 0.
    pub const NEVER: Self = Self(0);
    /// Probability 1.
    pub const ALWAYS: Self = Self(1 << 64);

    /// From a number in `0.0..=1.0`; the multiplication by 2⁶⁴ is exact.
    ///
    /// # Panics
    /// If the number is outside that range.
    #[must_use]
    pub fn new(probability: f64) -> Self {
        assert!((0.0..=1.0).contains(&probability), "probability {probability} not in 0..=1");
        Self((probability * 18_446_744_073_709_551_616.0) as u128)
    }
}

/// SplitMix64: turns any seed, zero included, into well-mixed words.
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xoshiro_matches_the_reference_stream() {
        let mut rng = SimRng { state: [0, 0, 0, 1] };
        let expected: [u64; 10] = [
            0x0000_0000_0080_0000,
            0x0000_0000_0080_0011,
            0x0002_2000_0080_0011,
            0x0002_2000_4400_0020,
            0x0002_2000_4480_08a1,
            0x0110_2100_8022_08a0,
            0x0114_0022_8420_0880,
            0x0402_8966_44a6_4095,
            0x8a14_a0a2_44ac_c891,
            0x8c88_ba46_80b2_0495,
        ];
        for word in expected {
            assert_eq!(rng.next_u64(), word);
        }
    }

    #[test]
    fn splitmix_matches_the_reference_stream() {
        let mut fill = SplitMix64(1_234_567);
        assert_eq!(fill.next(), 6_457_827_717_110_365_317);
        assert_eq!(fill.next(), 3_203_168_211_198_807_973);
        assert_eq!(fill.next(), 9_817_491_932_198_370_423);
    }

    #[test]
    fn streams_and_seeds_differ_and_repeat() {
        let words = |seed, stream| {
            let mut rng = SimRng::new(seed, stream);
            [rng.next_u64(), rng.next_u64(), rng.next_u64()]
        };
        assert_eq!(words(7, 0), words(7, 0));
        assert_ne!(words(7, 0), words(7, 1));
        assert_ne!(words(7, 0), words(8, 0));
        assert_ne!(words(0, 1), words(1, 0));
    }

    #[test]
    fn bounds_are_reached_and_kept() {
        let mut rng = SimRng::new(1, 0);
        let mut seen = [0u32; 4];
        for _ in 0..4000 {
            seen[usize::try_from(rng.up_to(3)).expect("0..=3")] += 1;
        }
        // 4000 draws, p = 1/4: mean 1000, sigma 27; five sigma.
        assert!(seen.iter().all(|&count| (863..=1137).contains(&count)), "{seen:?}");
        assert_eq!(rng.up_to(0), 0);
        let _ = rng.up_to(u64::MAX);
    }

    #[test]
    fn chance_never_and_always() {
        let mut rng = SimRng::new(1, 0);
        assert!((0..1000).all(|_| !rng.chance(Probability::new(0.0))));
        assert!((0..1000).all(|_| rng.chance(Probability::new(1.0))));
        let half = (0..10_000).filter(|_| rng.chance(Probability::new(0.5))).count();
        assert!((4750..=5250).contains(&half), "{half}");
    }
}
