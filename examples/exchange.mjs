// What the example agents say to each other once a channel is open: numbered messages and one blob, both of a known
// content, so that the receiver can tell what was lost, changed or out of order. Yours have something better to say.

const CHUNK = 16 * 1024
const OFFSET = 4 // bytes in front of a chunk that say where in the blob it belongs
const QUIET = 3000 // ms without news after which a lossy channel has lost what is missing

const pattern = Uint8Array.from({ length: 251 + CHUNK }, (_, at) => at % 251)
const piece = (at, length) => pattern.subarray(at % 251, (at % 251) + length)
const message = (number, size) => String(number).padStart(8, '0').padEnd(size, 'abcdefghijklmnopqrstuvwxyz'[number % 26])

/** Sends everything. `write` takes a string or bytes, and resolves when there is room for more. */
export async function sendAll(write, { messages, size, blob, lossy = false }) {
  // Nothing sends again what a burst loses on a lossy channel: it gets a steady stream.
  const breathe = () => lossy && new Promise((resolve) => setTimeout(resolve, 10))
  for (let number = 0; number < messages; number++) {
    await write(message(number, size))
    if (number % 10 === 9) await breathe()
  }
  for (let at = 0; at < blob; at += CHUNK - OFFSET) {
    await write(chunk(at, Math.min(CHUNK - OFFSET, blob - at)))
    await breathe()
  }
}

function chunk(at, length) {
  const bytes = new Uint8Array(OFFSET + length)
  new DataView(bytes.buffer).setUint32(0, at)
  bytes.set(piece(at, length), OFFSET)
  return bytes
}

/** Takes what arrives. `complete` resolves once all the other side has `announced` is here, or will not come. */
export class Inbox {
  lossy = false
  #numbers = new Set()
  #last = -1
  #inOrder = true
  #blob = 0
  #intact = true
  #announced
  #quiet
  #begin
  #resolve
  /** Resolves when the channel brings something, or nothing is sure to come: until then, some libraries lose what is sent. */
  begun = new Promise((resolve) => (this.#begin = resolve))
  complete = new Promise((resolve) => (this.#resolve = resolve))

  /** One message off the channel: a string, or bytes of the blob. */
  take(data) {
    this.#begin()
    if (typeof data === 'string') this.#takeMessage(data)
    else this.#takeChunk(new Uint8Array(data))
    this.#check()
  }

  /** The other side has sent all it had: so many messages, and a blob of so many bytes. */
  announce({ messages, blob }) {
    this.#announced = { messages, blob }
    if (this.lossy || messages + blob === 0) this.#begin()
    this.#check()
  }

  get summary() {
    const blob_ok = this.#intact && this.#blob === this.#announced?.blob
    return { received: this.#numbers.size, in_order: this.#inOrder, blob_ok }
  }

  /** Whether all came as the channel promises it. */
  get sound() {
    const { received, in_order, blob_ok } = this.summary
    return this.#intact && (this.lossy || (received === this.#announced?.messages && blob_ok))
  }

  #takeMessage(text) {
    const number = Number(text.slice(0, 8))
    if (text !== message(number, text.length)) return void (this.#intact = false)
    this.#inOrder &&= number > this.#last
    this.#last = number
    this.#numbers.add(number)
  }

  #takeChunk(bytes) {
    const at = new DataView(bytes.buffer).getUint32(0)
    const data = bytes.subarray(OFFSET)
    this.#intact &&= piece(at, data.length).every((byte, index) => byte === data[index])
    this.#blob += data.length
  }

  #check() {
    if (!this.#announced) return
    const { messages, blob } = this.#announced
    clearTimeout(this.#quiet)
    if (this.#numbers.size >= messages && this.#blob >= blob) this.#resolve()
    else if (this.lossy) this.#quiet = setTimeout(this.#resolve, QUIET)
  }
}
