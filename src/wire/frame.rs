//! Length-prefixed frames: u32 big-endian, then that many bytes. Zero is an error; so is more than the reader allows.

use std::io;
use std::ops::Deref;

use futures::{AsyncRead, AsyncReadExt as _};

use super::limits::READ_STEP_BYTES;

/// Bytes of the length.
pub const PREFIX_BYTES: usize = 4;
/// A buffer that grew beyond this for one large frame is given back afterwards.
const KEEP_BYTES: usize = 16 * 1024;
/// What a reader asks its stream for when it expects nothing large.
const SMALL_READ_BYTES: usize = 4 * 1024;

/// Why bytes are no frame.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream failed.
    #[error("the stream failed: {0}")]
    Io(#[from] io::Error),
    /// The announced length is above what is allowed here.
    #[error("a frame of {announced} bytes was announced where at most {limit} are allowed")]
    TooLong {
        /// What the prefix says.
        announced: usize,
        /// What is allowed.
        limit: usize,
    },
    /// A frame without content.
    #[error("an empty frame")]
    Empty,
    /// The stream ended inside a frame.
    #[error("the stream ended inside a frame")]
    Truncated,
}

impl FrameError {
    /// Whether the other side broke the protocol (and did not just go away).
    pub fn is_violation(&self) -> bool {
        matches!(self, Self::TooLong { .. } | Self::Empty)
    }
}

/// Appends `body` to `out` as a frame.
///
/// A body beyond 4 GiB is cut by its length field; no message of this crate comes near.
pub fn encode(body: &[u8], out: &mut Vec<u8>) {
    let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(body);
}

/// Starts a frame in `out` whose body is written next; [`finish`] fills its length in.
pub fn begin(out: &mut Vec<u8>) -> usize {
    out.extend_from_slice(&[0; PREFIX_BYTES]);
    out.len()
}

/// Ends the frame that [`begin`] started at `start`.
pub fn finish(out: &mut [u8], start: usize) {
    let length = u32::try_from(out.len() - start).unwrap_or(u32::MAX);
    out[start - PREFIX_BYTES..start].copy_from_slice(&length.to_be_bytes());
}

/// Takes bytes as they come and gives whole frames. It keeps what is left, so no caller can lose half a frame.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// Bytes at the front that were given out already.
    consumed: usize,
}

impl Decoder {
    /// Adds bytes that arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        self.reclaim();
        self.buffer.extend_from_slice(bytes);
    }

    fn reclaim(&mut self) {
        if self.consumed > 0 {
            self.buffer.drain(..self.consumed);
            self.consumed = 0;
            if self.buffer.is_empty() && self.buffer.capacity() > KEEP_BYTES {
                self.buffer = Vec::new();
            }
        }
    }

    /// Bytes that wait, whole frames or not.
    pub fn pending(&self) -> usize {
        self.buffer.len() - self.consumed
    }

    /// The extent of the next whole frame of at most `limit` bytes; `None` when more bytes are needed.
    ///
    /// # Errors
    /// [`FrameError::TooLong`] as soon as the length is there, before anything is allocated for it; [`FrameError::Empty`].
    fn peek(&self, limit: usize) -> Result<Option<(usize, usize)>, FrameError> {
        let waiting = &self.buffer[self.consumed..];
        let Some(prefix) = waiting.first_chunk::<PREFIX_BYTES>() else { return Ok(None) };
        let announced = u32::from_be_bytes(*prefix) as usize;
        if announced == 0 {
            return Err(FrameError::Empty);
        }
        if announced > limit {
            return Err(FrameError::TooLong { announced, limit });
        }
        let start = self.consumed + PREFIX_BYTES;
        Ok((waiting.len() >= PREFIX_BYTES + announced).then_some((start, start + announced)))
    }

    /// Takes the next whole frame of at most `limit` bytes; `None` when more bytes are needed.
    ///
    /// # Errors
    /// [`FrameError::TooLong`], [`FrameError::Empty`]: the stream is out of step and must be dropped.
    pub fn next(&mut self, limit: usize) -> Result<Option<Frame<'_>>, FrameError> {
        Ok(self.peek(limit)?.map(|(start, end)| {
            self.consumed = end;
            Frame(&self.buffer[start..end])
        }))
    }
}

/// The body of a frame, inside the reader's buffer.
#[derive(Debug)]
pub struct Frame<'a>(&'a [u8]);

impl Deref for Frame<'_> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.0
    }
}

/// Reads frames from a stream.
#[derive(Debug)]
pub struct FrameReader<R> {
    stream: R,
    decoder: Decoder,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// A reader over `stream`.
    pub fn new(stream: R) -> Self {
        Self { stream, decoder: Decoder::default() }
    }

    /// The stream, for writing to it.
    pub fn get_mut(&mut self) -> &mut R {
        &mut self.stream
    }

    /// The next frame of at most `limit` bytes; `None` when the stream ended between two frames.
    ///
    /// Cancel-safe: what was read stays in the reader.
    ///
    /// # Errors
    /// [`FrameError`]. After anything but `Io` the stream is out of step.
    pub async fn next(&mut self, limit: usize) -> Result<Option<Frame<'_>>, FrameError> {
        loop {
            if let Some((start, end)) = self.decoder.peek(limit)? {
                self.decoder.consumed = end;
                return Ok(Some(Frame(&self.decoder.buffer[start..end])));
            }
            match self.fill().await? {
                0 if self.decoder.pending() == 0 => return Ok(None),
                0 => return Err(FrameError::Truncated),
                _ => {}
            }
        }
    }

    /// Waits for the length of the next frame: how many bytes its body has, 0 when the stream ended before it.
    ///
    /// Cancel-safe: what was read stays in the reader.
    ///
    /// # Errors
    /// As [`FrameReader::next`].
    pub async fn announced(&mut self, limit: usize) -> Result<usize, FrameError> {
        loop {
            self.decoder.peek(limit)?;
            let waiting = &self.decoder.buffer[self.decoder.consumed..];
            if let Some(prefix) = waiting.first_chunk::<PREFIX_BYTES>() {
                return Ok(u32::from_be_bytes(*prefix) as usize);
            }
            if self.fill().await? == 0 {
                return if self.decoder.pending() == 0 { Ok(0) } else { Err(FrameError::Truncated) };
            }
        }
    }

    /// Waits until the next frame is here whole, for [`FrameReader::next`] to give; false when the stream ended before it.
    ///
    /// Cancel-safe: what was read stays in the reader.
    ///
    /// # Errors
    /// As [`FrameReader::next`].
    pub async fn whole(&mut self, limit: usize) -> Result<bool, FrameError> {
        let Some(length) = self.next(limit).await?.map(|frame| frame.len()) else { return Ok(false) };
        // It is given once more.
        self.decoder.consumed -= PREFIX_BYTES + length;
        Ok(true)
    }

    /// Bytes that have come and were not taken.
    pub fn pending(&self) -> usize {
        self.decoder.pending()
    }

    /// Gives back what a large frame took, which otherwise waits for the next bytes to come.
    pub fn release(&mut self) {
        self.decoder.reclaim();
    }

    /// Lets the next frame pass without ever holding it whole; gives at most `keep` bytes of its beginning.
    ///
    /// Not cancel-safe.
    ///
    /// # Errors
    /// As [`FrameReader::next`].
    pub async fn skip(&mut self, limit: usize, keep: usize) -> Result<Vec<u8>, FrameError> {
        let mut left = self.announced(limit).await?;
        if left == 0 {
            return Ok(Vec::new());
        }
        self.decoder.consumed += PREFIX_BYTES;
        let mut head = Vec::new();
        loop {
            let waiting = &self.decoder.buffer[self.decoder.consumed..];
            let taken = waiting.len().min(left);
            head.extend_from_slice(&waiting[..taken.min(keep - head.len())]);
            self.decoder.consumed += taken;
            left -= taken;
            if left == 0 {
                return Ok(head);
            }
            if self.fill().await? == 0 {
                return Err(FrameError::Truncated);
            }
        }
    }

    /// Waits for the first byte of a frame; false when the stream ended before it. For readers that wait for a frame as
    /// long as it takes, but not for its rest.
    ///
    /// Cancel-safe: what was read stays in the reader.
    ///
    /// # Errors
    /// [`FrameError::Io`].
    pub async fn begun(&mut self) -> Result<bool, FrameError> {
        Ok(self.decoder.pending() > 0 || self.fill().await? > 0)
    }

    /// Reads once; gives the number of bytes, 0 at the end of the stream.
    async fn fill(&mut self) -> io::Result<usize> {
        self.decoder.reclaim();
        let buffer = &mut self.decoder.buffer;
        let have = buffer.len();
        let step = if have >= SMALL_READ_BYTES { READ_STEP_BYTES } else { SMALL_READ_BYTES };
        buffer.resize(have + step, 0);
        // The read below may never finish, when the caller drops this future: this guard cuts the buffer back.
        let mut guard = Cut { buffer, keep: have };
        let read = self.stream.read(&mut guard.buffer[have..]).await;
        if let Ok(count) = read {
            guard.keep = have + count;
        }
        read
    }
}

/// Cuts a buffer back to the bytes that are real, also when the future that filled it is dropped.
struct Cut<'a> {
    buffer: &'a mut Vec<u8>,
    keep: usize,
}

impl Drop for Cut<'_> {
    fn drop(&mut self) {
        self.buffer.truncate(self.keep);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_frame_at_the_limit_passes_and_one_past_it_does_not() {
        for (length, passes) in [(8, true), (9, false)] {
            let mut bytes = Vec::new();
            encode(&vec![7; length], &mut bytes);
            let mut decoder = Decoder::default();
            decoder.push(&bytes);
            assert_eq!(decoder.next(8).is_ok(), passes, "{length}");
        }
    }

    #[tokio::test]
    async fn a_length_is_told_before_its_body_is_there() {
        let bytes: &[u8] = &[0, 0, 0, 8, 1, 2];
        let mut reader = FrameReader::new(bytes);
        assert_eq!(reader.announced(8).await.unwrap(), 8);
        assert_eq!(reader.announced(8).await.unwrap(), 8, "it takes nothing away");
        assert!(matches!(reader.announced(7).await, Err(FrameError::TooLong { announced: 8, limit: 7 })));
        assert!(matches!(reader.next(8).await, Err(FrameError::Truncated)));
        assert_eq!(FrameReader::new(&[][..]).announced(8).await.unwrap(), 0);
        assert!(matches!(FrameReader::new(&[0][..]).announced(8).await, Err(FrameError::Truncated)));
    }

    #[test]
    fn a_huge_length_is_refused_before_anything_is_allocated() {
        let mut decoder = Decoder::default();
        decoder.push(&u32::MAX.to_be_bytes());
        assert!(matches!(decoder.next(1 << 20), Err(FrameError::TooLong { .. })));
        assert!(decoder.buffer.capacity() < 1024);
    }

    #[tokio::test]
    async fn an_announced_length_costs_nothing_until_its_bytes_come() {
        use futures::io::Cursor;
        // Refused: beyond the limit. Believed, but nothing follows: within it.
        for (announced, refused) in [(u32::MAX, true), ((1 << 20) + 1, true), (1 << 20, false)] {
            let mut reader = FrameReader::new(Cursor::new(announced.to_be_bytes().to_vec()));
            let outcome = reader.next(1 << 20).await.map(|_| ());
            assert_eq!(matches!(outcome, Err(FrameError::TooLong { .. })), refused, "{announced}");
            assert_eq!(matches!(outcome, Err(FrameError::Truncated)), !refused, "{announced}");
            assert!(reader.decoder.buffer.capacity() <= 2 * SMALL_READ_BYTES, "{announced}");
        }
        let mut bytes = Vec::new();
        encode(&vec![7; 1 << 20], &mut bytes);
        bytes.truncate(100_000);
        let mut reader = FrameReader::new(Cursor::new(bytes));
        assert!(reader.next(1 << 20).await.is_err());
        assert!(reader.decoder.buffer.capacity() <= 2 * (100_000 + READ_STEP_BYTES), "what came, and a step more");
    }

    #[test]
    fn an_empty_frame_is_refused() {
        let mut decoder = Decoder::default();
        decoder.push(&[0; 4]);
        assert!(matches!(decoder.next(8), Err(FrameError::Empty)));
    }

    #[test]
    fn frames_survive_one_byte_at_a_time() {
        let mut bytes = Vec::new();
        encode(b"one", &mut bytes);
        encode(b"two", &mut bytes);
        let mut decoder = Decoder::default();
        let mut frames = Vec::new();
        for byte in bytes {
            decoder.push(&[byte]);
            while let Some(frame) = decoder.next(8).unwrap() {
                frames.push(frame.to_vec());
            }
        }
        assert_eq!(frames, [b"one".to_vec(), b"two".to_vec()]);
    }

    #[tokio::test]
    async fn no_frame_is_lost_when_reading_is_given_up_again_and_again() {
        use futures::AsyncWriteExt as _;
        use std::time::Duration;
        use tokio_util::compat::TokioAsyncReadCompatExt as _;
        let (ours, theirs) = tokio::io::duplex(3);
        let mut writer = theirs.compat();
        let mut reader = FrameReader::new(ours.compat());
        let sending = tokio::spawn(async move {
            for number in 0..500_u32 {
                let mut bytes = Vec::new();
                encode(&number.to_be_bytes(), &mut bytes);
                for byte in bytes {
                    writer.write_all(&[byte]).await.unwrap();
                    tokio::task::yield_now().await;
                }
            }
        });
        let mut expected = 0_u32;
        while expected < 500 {
            let give_up = tokio::time::timeout(Duration::ZERO, reader.next(8)).await;
            if let Ok(frame) = give_up {
                assert_eq!(*frame.unwrap().unwrap(), expected.to_be_bytes());
                expected += 1;
            }
            tokio::task::yield_now().await;
        }
        sending.await.unwrap();
    }

    #[tokio::test]
    async fn a_reader_can_wait_for_the_first_byte_alone() {
        let mut reader = FrameReader::new(&[0, 0, 0, 1, 9][..]);
        assert!(reader.begun().await.unwrap());
        assert!(reader.begun().await.unwrap(), "asking again takes nothing away");
        assert_eq!(&*reader.next(8).await.unwrap().unwrap(), &[9]);
        assert!(!reader.begun().await.unwrap());
    }

    #[tokio::test]
    async fn an_announced_length_costs_no_memory_until_its_bytes_come() {
        let mut bytes = (1_u32 << 20).to_be_bytes().to_vec();
        bytes.extend_from_slice(&[7; 100]);
        let mut reader = FrameReader::new(&bytes[..]);
        assert!(matches!(reader.next(1 << 20).await, Err(FrameError::Truncated)));
        assert!(reader.decoder.buffer.capacity() <= 2 * READ_STEP_BYTES, "{}", reader.decoder.buffer.capacity());
    }

    #[tokio::test]
    async fn the_end_of_a_stream_is_clean_only_between_frames() {
        let mut whole = FrameReader::new(&[0, 0, 0, 1, 9][..]);
        assert_eq!(&*whole.next(8).await.unwrap().unwrap(), &[9]);
        assert!(whole.next(8).await.unwrap().is_none());
        let mut cut = FrameReader::new(&[0, 0, 0, 2, 9][..]);
        assert!(matches!(cut.next(8).await, Err(FrameError::Truncated)));
    }

    proptest! {
        #[test]
        fn any_split_gives_the_same_frames(bodies in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..40), 0..20), step in 1_usize..50) {
            let mut bytes = Vec::new();
            for body in &bodies { encode(body, &mut bytes); }
            let mut decoder = Decoder::default();
            let mut seen = Vec::new();
            for chunk in bytes.chunks(step) {
                decoder.push(chunk);
                while let Some(frame) = decoder.next(64).unwrap() { seen.push(frame.to_vec()); }
            }
            prop_assert_eq!(seen, bodies);
            prop_assert_eq!(decoder.pending(), 0);
        }
    }
}
