#!/usr/bin/env node
// One of the agents of a room, each connected to each: a control channel (requests and answers), a bulk channel that
// respects backpressure, and a metrics channel that may lose what is late.
import { createHash, randomBytes } from 'node:crypto'
import { cleanup, PeerConnection } from 'node-datachannel'
import WebSocket from 'ws'
import { commandLine, fetchIce } from '../cli.mjs'

const { url, tls, flags, relayOnly } = commandLine({
  agents: { type: 'string', default: '2' }, // in the room, this one included
  bulk: { type: 'string', default: '1048576' }, // bytes for each of the others
})
const others = Number(flags.agents) - 1
const CHANNELS = { control: {}, bulk: {}, metrics: { unordered: true, maxRetransmits: 0 } }
const [CHUNK, HIGH_WATER, PATIENCE, SAMPLES] = [16 * 1024, 256 * 1024, 10_000, 100]

/** The connection to one other agent. */
class Link {
  #channels = {}
  #waiting = new Map()
  #last = 0
  #digest = createHash('sha256')
  #samples = 0
  #ended
  #whole = new Promise((resolve) => (this.#ended = resolve))

  constructor(agent) {
    this.connection = new PeerConnection(agent, { iceServers: ice.iceServers.flatMap(nativeServers) })
    this.connection.onLocalDescription((sdp, type) => signal({ type, to: agent, sdp: allowed(sdp) }))
    this.connection.onLocalCandidate((candidate, sdpMid) => {
      if (mayUse(candidate)) signal({ type: 'iceCandidate', to: agent, candidate: { candidate, sdpMid, sdpMLineIndex: 0 } })
    })
    this.connection.onDataChannel((channel) => this.#add(channel))
    this.ready = new Promise((resolve) => (this.opened = resolve))
  }

  call() {
    for (const [label, options] of Object.entries(CHANNELS)) this.#add(this.connection.createDataChannel(label, options))
  }

  /** Asks over the control channel; fails when there is no answer in time. */
  ask(method) {
    const id = ++this.#last
    this.#channels.control.sendMessage(JSON.stringify({ id, method }))
    return new Promise((resolve, reject) => {
      const timer = setTimeout(() => reject(new Error(`no answer to ${method}`)), PATIENCE)
      this.#waiting.set(id, (result) => resolve(result, clearTimeout(timer)))
    })
  }

  /** Sends bytes in chunks, never more at a time than the network takes; says whether they arrived intact. */
  async sendBulk(bytes) {
    const { bulk } = this.#channels
    for (let at = 0; at < bytes.length; at += CHUNK) {
      bulk.sendMessageBinary(bytes.subarray(at, at + CHUNK))
      if (bulk.bufferedAmount() > HIGH_WATER) await new Promise((resolve) => bulk.onBufferedAmountLow(resolve))
    }
    bulk.sendMessage('end')
    return (await this.ask('digest')) === createHash('sha256').update(bytes).digest('hex')
  }

  /** Samples are worth nothing when late: they are sent once, and nobody waits. */
  sendSamples() {
    for (let number = 0; number < SAMPLES; number++) this.#channels.metrics.sendMessage(JSON.stringify({ number }))
  }

  #add(channel) {
    const label = channel.getLabel()
    channel.setBufferedAmountLowThreshold(HIGH_WATER / 2)
    channel.onMessage((data) => this.#receive[label](data))
    this.#channels[label] = channel
    channel.onOpen(() => {
      const open = Object.values(this.#channels).filter((channel) => channel.isOpen())
      if (open.length === Object.keys(CHANNELS).length) this.opened()
    })
  }

  #receive = {
    control: (text) => {
      const { id, method, result } = JSON.parse(text)
      const answer = (result) => this.#channels.control.sendMessage(JSON.stringify({ id, result }))
      if (method) this.#answers[method](answer)
      else this.#waiting.get(id)?.(result)
    },
    bulk: (data) => (data === 'end' ? this.#ended(this.#digest.digest('hex')) : this.#digest.update(data)),
    metrics: () => this.#samples++,
  }

  #answers = {
    ping: (answer) => answer('pong'),
    digest: (answer) => this.#whole.then(answer),
    samples: (answer) => answer(this.#samples),
  }
}

const ice = await fetchIce(url, tls)
const links = new Map()
const finished = new Set()
const socket = new WebSocket(new URL('/v1/ws', url), 'halfway.v1', tls)
socket.on('open', () => signal({ type: 'hello', card: { name: 'mesh' } }))
socket.on('message', (frame) => receive(JSON.parse(frame)))
socket.on('close', (code) => fail(`signaling closed (${code})`))
socket.on('error', (error) => fail(error.message))

function receive(frame) {
  // Who comes later calls: no two agents ever offer to each other.
  if (frame.type === 'welcome') frame.agents.forEach(({ agent }) => link(agent).call())
  if (frame.type === 'error') fail(`${frame.code}: ${frame.message}`)
  if (frame.type === 'agentLeft' && !finished.has(frame.agent)) fail(`${frame.agent} left early`)
  if (frame.type === 'message') finished.add(frame.from)
  if (frame.type === 'message' && finished.size > others) finish(0)
  const { connection } = links.get(frame.from) ?? (frame.type === 'offer' ? link(frame.from) : {})
  if (frame.sdp) connection?.setRemoteDescription(allowed(frame.sdp), frame.type)
  if (frame.type === 'iceCandidate' && frame.candidate && mayUse(frame.candidate.candidate))
    connection?.addRemoteCandidate(frame.candidate.candidate, frame.candidate.sdpMid)
}

function link(agent) {
  const link = new Link(agent)
  links.set(agent, link)
  link.ready.then(() => links.size === others && Promise.all([...links.values()].map((link) => link.ready)).then(work))
  return link
}

let working = false
async function work() {
  if (working) return
  working = true
  const results = await Promise.all([...links.values()].map(exercise)).catch((error) => fail(error.message))
  if (!results) return
  console.log(JSON.stringify({
    links: results.length,
    bulk_ok: results.every(({ intact }) => intact),
    samples: Math.min(...results.map(({ samples }) => samples)),
    round_trip_ms: Math.max(...results.map(({ round_trip_ms }) => round_trip_ms)),
  }))
  signal({ type: 'message', payload: 'finished' })
  finished.add('me')
  if (finished.size > others) finish(0)
}

async function exercise(link) {
  const asked = performance.now()
  if ((await link.ask('ping')) !== 'pong') throw new Error('that is no answer to ping')
  const round_trip_ms = Math.round(performance.now() - asked)
  link.sendSamples()
  const intact = await link.sendBulk(randomBytes(Number(flags.bulk)))
  return { intact, round_trip_ms, samples: await link.ask('samples') }
}

// libjuice has no relay-only mode: see ../node-datachannel.
function mayUse(candidate) { return !relayOnly || / typ relay\b/.test(candidate) }
function allowed(sdp) {
  return sdp.split(/(?<=\n)/).filter((line) => !line.startsWith('a=candidate:') || mayUse(line)).join('')
}
function nativeServers({ urls, username, credential }) {
  const parts = urls.map((url) => /^(stun|turn):(.+?)(?::(\d+))?(?:\?transport=udp)?$/.exec(url)).filter(Boolean)
  return parts.map(([, scheme, host, port = 3478]) => {
    const server = { hostname: host.replace(/[[\]]/g, ''), port: Number(port) }
    return scheme === 'stun' ? server : { ...server, username, password: credential, relayType: 'TurnUdp' }
  })
}
function signal(frame) { socket.send(JSON.stringify(frame)) }
function fail(why) { console.error(why); finish(1) }
function finish(code) {
  process.exitCode ??= code
  socket.removeAllListeners('close')
  socket.close()
  for (const { connection } of links.values()) connection.close()
  cleanup()
}
