// Play 16-bit little-endian mono PCM at 24 kHz while it arrives, and collect it for a WAV file.

export const SAMPLE_RATE = 24_000;

/** Seconds between the arrival of a chunk and its playback. The delay tolerates small delays of the next chunk. */
const LEAD = 0.06;

/** Plays chunks of samples without gaps. */
export class Player {
  constructor() {
    this.context = new AudioContext({ sampleRate: SAMPLE_RATE });
    this.frame = 0; // the start of the next chunk, in samples of the context's clock
    this.pauses = 0; // how often playback ended before the next chunk arrived
  }

  /** @param {Float32Array} samples within [-1, 1] */
  play(samples) {
    const buffer = this.context.createBuffer(1, samples.length, SAMPLE_RATE);
    buffer.copyToChannel(samples, 0);
    const source = new AudioBufferSourceNode(this.context, { buffer });
    source.connect(this.context.destination);
    const present = this.context.currentTime * SAMPLE_RATE;
    if (this.frame < present) {
      this.pauses += this.frame > 0 ? 1 : 0;
      this.frame = Math.ceil(present + LEAD * SAMPLE_RATE);
    }
    source.start(this.frame / SAMPLE_RATE);
    this.frame += samples.length;
  }

  /** Wait until playback has ended. */
  async finished() {
    const left = this.frame / SAMPLE_RATE - this.context.currentTime;
    await new Promise((resolve) => { setTimeout(resolve, 1000 * Math.max(0, left)); });
    await this.close();
  }

  async close() {
    if (this.context.state !== "closed") await this.context.close();
  }
}

/** Collects bytes that arrive in chunks of any length, and converts them to samples. */
export class Samples {
  constructor() {
    this.pieces = [];
    this.length = 0; // samples so far
    this.rest = new Uint8Array(0);
  }

  /** Add bytes. Returns the new complete samples as floats within [-1, 1]. */
  add(bytes) {
    const joined = new Uint8Array(this.rest.length + bytes.length);
    joined.set(this.rest);
    joined.set(bytes, this.rest.length);
    const whole = joined.length - (joined.length % 2);
    this.rest = joined.slice(whole);
    const view = new DataView(joined.buffer, 0, whole);
    const samples = Float32Array.from({ length: whole / 2 }, (_, index) => view.getInt16(2 * index, true) / 32768);
    this.pieces.push(joined.subarray(0, whole));
    this.length += samples.length;
    return samples;
  }

  get seconds() {
    return this.length / SAMPLE_RATE;
  }

  /** Return the lowest and the highest sample of each of `columns` equal parts, within [-1, 1]. */
  peaks(columns) {
    const all = new Int16Array(this.length);
    let start = 0;
    for (const piece of this.pieces) {
      const view = new DataView(piece.buffer, piece.byteOffset, piece.byteLength);
      for (let index = 0; index < piece.byteLength / 2; index += 1) all[start + index] = view.getInt16(2 * index, true);
      start += piece.byteLength / 2;
    }
    return Array.from({ length: columns }, (_, column) => {
      const part = all.subarray(Math.floor((column * all.length) / columns), Math.ceil(((column + 1) * all.length) / columns));
      return part.reduce(([low, high], value) => [Math.min(low, value / 32768), Math.max(high, value / 32768)], [0, 0]);
    });
  }

  /** Return all samples as a WAV file. */
  wav() {
    return wavFile(this.pieces, this.length);
  }
}

/** Return `length` samples, little-endian with 16 bits, as a WAV file. */
export function wavFile(pieces, length) {
  const bytes = 2 * length;
  const header = new DataView(new ArrayBuffer(44));
  const write = (offset, text) => [...text].forEach((letter, index) => header.setUint8(offset + index, letter.charCodeAt(0)));
  write(0, "RIFF");
  header.setUint32(4, 36 + bytes, true);
  write(8, "WAVEfmt ");
  header.setUint32(16, 16, true); // size of the format fields
  header.setUint16(20, 1, true); // PCM
  header.setUint16(22, 1, true); // channels
  header.setUint32(24, SAMPLE_RATE, true);
  header.setUint32(28, 2 * SAMPLE_RATE, true); // bytes per second
  header.setUint16(32, 2, true); // bytes per sample
  header.setUint16(34, 16, true); // bits per sample
  write(36, "data");
  header.setUint32(40, bytes, true);
  return new Blob([header, ...pieces], { type: "audio/wav" });
}
