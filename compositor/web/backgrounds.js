/**
 * A tenant's prepared frames, fetched once: with them a viewer needs only patches. Kept as JPEG, for pixels are many.
 */

const AT_ONCE = 6;

export class Backgrounds {
  /**
   * Fetches all of a tenant's, as /v1/tenants/{id} describes it. `tell(done, all, bytes)` is called after each;
   * aborting `signal` gives up.
   */
  static async fetch(tenant, tell, signal) {
    const { frames, frame_url: url } = tenant;
    const blobs = new Array(frames);
    let [next, done, bytes] = [0, 0, 0];
    const fetchSome = async () => {
      while (next < frames) {
        const number = next++;
        const response = await fetch(url.replace("{number}", number), { signal });
        if (!response.ok) throw new Error(`Prepared frame ${number} cannot be had (HTTP ${response.status}).`);
        blobs[number] = await response.blob();
        bytes += blobs[number].size;
        tell(++done, frames, bytes);
      }
    };
    await Promise.all(Array.from({ length: AT_ONCE }, fetchSome));
    return new Backgrounds(tenant.version, blobs);
  }

  /** version: of the tenant's files. */
  constructor(version, blobs) {
    this.version = version;
    this.blobs = blobs;
  }

  /** Prepared frame `number`, for drawing; whoever draws it closes it. */
  bitmap(number) {
    return createImageBitmap(this.blobs[number]);
  }
}
