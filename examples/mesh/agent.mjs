#!/usr/bin/env node
// One of the agents of a room, each connected to each: a control channel (requests and answers), a bulk channel that
// respects backpressure, and a metrics channel that may lose what is late.
import { createHash, randomBytes } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import { PeerConnection } from 'node-datachannel'
import WebSocket from 'ws'
import { commandLine, fetchIce } from '../cli.mjs'
import { candidateFilter, finishBeforeYielding, nativeServers } from '../libjuice.mjs'

const { url, tls, flags, relayOnly } = commandLine({
  agents: { type: 'string', default: '2' }, // in the room, this one included
  bulk: { type: 'string', default: '1048576' }, // bytes for each of the others
})
const { mayUse, allowed } = candidateFilter(relayOnly)
const others = Number(flags.agents) - 1
const CHANNELS = { control: {}, bulk: {}, metrics: { unordered: true, maxRetransmits: 0 } }
const [CHUNK, HIGH_WATER, SAMPLES] = [16 * 1024, 256 * 1024, 100]
const [PATIENCE, TRIES] = [4_000, 3] // milliseconds for an answer, and how often a request is sent

/** The connection to one other agent. */
class Link {
  #channels = {}
  #waiting = new Map()
  #last = 0
  #digest = createHash('sha256')
  #samples = 0
  #drained = () => {}
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

  /** Asks over the control channel, and again when there is no answer in time: a request may meet an agent too early. */
  async ask(method) {
    const id = ++this.#last
    const answered = new Promise((resolve) => this.#waiting.set(id, (result) => resolve({ result })))
    for (let tries = 0; tries < TRIES; tries++) {
      this.#channels.control.sendMessage(JSON.stringify({ id, method }))
      const answer = await Promise.race([answered, sleep(PATIENCE)])
      if (answer) return answer.result
    }
    throw new Error(`no answer to ${method}`)
  }

  /** Sends bytes in chunks, never more at a time than the network takes; says whether they arrived intact. */
  async sendBulk(bytes) {
    const { bulk } = this.#channels
    for (let at = 0; at < bytes.length; at += CHUNK) {
      bulk.sendMessageBinary(bytes.subarray(at, at + CHUNK))
      if (bulk.bufferedAmount() > HIGH_WATER) await new Promise((resolve) => (this.#drained = resolve))
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
    if (label === 'bulk') channel.onBufferedAmountLow(() => this.#drained())
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

finishBeforeYielding()
const ice = await fetchIce(url, tls)
const links = new Map()
const finished = new Set()
const socket = new WebSocket(new URL('/v1/ws', url), 'halfway.v1', tls)
socket.on('open', () => signal({ type: 'hello', card: { name: 'mesh' } }))
socket.on('message', (text) => {
  try { receive(JSON.parse(text)) } catch (error) { fail(error.message) }
})
socket.on('close', (code) => fail(`signaling closed (${code})`))
socket.on('error', (error) => fail(error.message))

function receive(frame) {
  // Who comes later calls: no two agents ever offer to each other.
  if (frame.type === 'welcome') frame.agents.forEach(({ agent }) => link(agent).call())
  if (frame.type === 'error') fail(`${frame.code}: ${frame.message}`)
  if (frame.type === 'agentLeft' && !finished.has(frame.agent)) fail(`${frame.agent} left early`)
  if (frame.type === 'message') finished.add(frame.from)
  if (frame.type === 'delivered') finished.add(frame.id)
  if (finished.size > others) finish(0)
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
  // Gone only when the others know why.
  signal({ type: 'message', payload: 'finished', id: 'myself' })
}

async function exercise(link) {
  const asked = performance.now()
  if ((await link.ask('ping')) !== 'pong') throw new Error('that is no answer to ping')
  const round_trip_ms = Math.round(performance.now() - asked)
  link.sendSamples()
  const intact = await link.sendBulk(randomBytes(Number(flags.bulk)))
  return { intact, round_trip_ms, samples: await link.ask('samples') }
}

function signal(frame) { socket.send(JSON.stringify(frame)) }
function fail(why) { console.error(why); finish(1) }
function finish(code) {
  for (const { connection } of links.values()) connection.close()
  process.exit(code)
}
